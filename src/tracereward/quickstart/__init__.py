"""The quickstart: the full method on generated arithmetic with a tiny Llama."""
