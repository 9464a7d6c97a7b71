"""Causal language models: loading, tokenization, batches, log-probs, adapters, processes."""
