"""A row as `tracereward score` writes it."""


def row_of(tokens: list[str], rewards: list[float], **fields) -> dict:
    """Build a scored row; the token "</s>" is the end of the sequence."""
    offsets, end = [], 0
    for token in tokens:
        length = 0 if token == "</s>" else len(token)
        offsets.append([end, end + length])
        end += length
    text = "".join(token for token in tokens if token != "</s>")
    row = {"prompt": "q", "completion": text, "tokens": tokens, "offsets": offsets, "token_rewards": rewards}
    return {**row, **fields}
