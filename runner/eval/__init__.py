"""From logits to spans, answers and scores.

- `inference`: runs the model over windows
- `span_search`: the best spans of each window, none longer than an answer may be (`search`)
- `answers`: a question's answer over all its windows
- `evaluation`: exact match, F1, thresholds
- `caveats`: ceilings and leaks that scores do not show
- `results`: scores for result.json and the log
- `predictions`: predictions.jsonl
- `score_file`: scores any file of predictions
- `hf_metrics`: the metrics as `evaluate` objects
"""
