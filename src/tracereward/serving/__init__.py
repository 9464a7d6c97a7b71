"""HTTP server for a reward model: scoring, reranking, and a best-of-N proxy for an OpenAI-compatible server."""
