"""Tasks for lm-eval that run without a network: `recall_text_once` and `recall_text_twice`."""
