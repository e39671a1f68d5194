"""spantune's runner: from a job file to a fine-tuned extractive question-answering model.

runner/README.md is the map: what stands where, which package may import which, the life of a job
and of a batch. Importing this package never imports torch.
"""

__version__ = "0.1.0"
