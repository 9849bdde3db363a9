"""deltalab's language models in Hugging Face's classes; `deltalab.auto_models` makes them known there."""
