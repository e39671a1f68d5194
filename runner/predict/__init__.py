"""Answers to new questions.

- `predictor`: a model that answers
- `stream`: `predict`, line by line
- `questions`: rows that are asked
- `evaluate`: `evaluate`: scores of a model on other data
- `pipeline`: the question-answering pipeline that transformers 5 removed
"""
