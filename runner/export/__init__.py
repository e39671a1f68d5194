"""The model folder: written, described, and proved in a fresh process.

- `save`: weights, tokenizer and configuration
- `model_card`: its README.md, by `templates/model_card.md.j2`
- `verify`: a fresh process gives the same logits
- `fresh_logits`: the script of that process
"""
