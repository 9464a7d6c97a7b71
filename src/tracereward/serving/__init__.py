"""A reward model behind HTTP: scores, reranking, and best-of-N in front of an OpenAI-compatible server."""
