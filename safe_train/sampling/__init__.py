"""Completions from the policy, by transformers or by vLLM."""
