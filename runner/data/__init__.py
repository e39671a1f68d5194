"""From files and the hub to batches of windows on the device.

- `hub`: snapshots of the Hugging Face hub
- `formats`: rows of files of every format (a folder; `formats/layouts`: one file a format)
- `dataset`: rows, checked, as examples
- `splits`: a run's data sets: training, validation, tuning
- `tokenize`: texts as token ids and offsets
- `windows`: examples as windows with labels (`answer_tokens`)
- `window_cache`: windows kept on disk
- `sampler`: which windows each step sees
- `collate`: windows as a batch on the host
- `loader`: batches on the device, padded or packed
"""
