"""The pretrained encoder, and what is done to it.

- `structure`: where encoders keep layers and positions
- `config`: config.json, read and refused
- `load`: a model's files, found once; tokenizer, weights
- `freeze`: which parameters are trained
- `forward`: batches in, logits out
- `loss`: which kernel computes the span loss
- `attention`: attention of packed windows
- `qkv`: its three projections in one product
- `dropout`: dropout masks on a CPU
- `frozen`: frozen layers' outputs, cached
"""
