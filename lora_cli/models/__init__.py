"""Base models, adapters, tokenizers, chat templates, targets, initial weights, fingerprints and probes."""
