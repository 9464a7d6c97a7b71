"""Near-duplicate texts: pairs whose sets of word triples overlap by a Jaccard index of at least a threshold.

Candidate pairs come from MinHash signatures in bands (Broder 1997); each pair is then compared exactly, so that no pair
below the threshold is returned. A pair at 0.8 is missed with a probability of 1 in 1,800, one at 0.9 of 1e-9.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

BANDS, ROWS = 32, 7  # of hashes: a pair with Jaccard index j becomes a candidate with probability 1 - (1 - j^7)^32
THRESHOLD = 0.8
WORDS = 3  # of a shingle
_LARGEST_GROUP = 50  # texts of one band that are all compared: of more equal ones each is compared with the first


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """Pairs (i, j, Jaccard index), i < j, in order, of texts that are nearly the same.

    Case, punctuation and white space do not count; numbers do. Texts without a word are equal to nothing.

    Args:
        texts: any number.
        threshold: smallest index of a pair.
    """
    shingles = [_shingles(text) for text in texts]
    found: dict[tuple[int, int], float] = {}
    for group in _candidates(shingles):
        firsts = group[:1] if len(group) > _LARGEST_GROUP else group
        for i in firsts:
            for j in group:
                if i < j and (i, j) not in found:
                    found[i, j] = jaccard(shingles[i], shingles[j])
    return [(*pair, index) for pair, index in sorted(found.items()) if index >= threshold]


def near_groups(texts: Sequence[str]) -> list[int]:
    """The number of each text's group: equal and nearly equal texts, directly or through others, are in one."""
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    parents = [first[text] for text in texts]

    def root(number: int) -> int:
        while parents[number] != number:
            number = parents[number]
        return number

    for one, other, _ in near_duplicates(texts):
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    return [root(number) for number in range(len(texts))]


def jaccard(one: set[int], other: set[int]) -> float:
    """|A and B| / |A or B|; 0 for two empty sets."""
    return len(one & other) / max(1, len(one | other))


def _shingles(text: str) -> set[int]:
    """Hashes of a text's runs of `WORDS` words; of all its words, if they are fewer."""
    words = re.findall(r"\w+(?:[.,]\d+)*|[-+*/=<>^%]", text.casefold())
    runs = [words[i : i + WORDS] for i in range(max(1, len(words) - WORDS + 1))] if words else []
    digests = (hashlib.blake2b(" ".join(run).encode(), digest_size=8).digest() for run in runs)
    return {int.from_bytes(digest, "little") for digest in digests}


def _candidates(shingles: Sequence[set[int]]) -> list[list[int]]:
    """Groups of texts whose signatures agree in a band."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**64, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    shifts = rng.integers(0, 2**64, BANDS * ROWS, dtype=np.uint64)
    groups: dict[tuple[int, bytes], list[int]] = {}
    for number, held in enumerate(shingles):
        if held:
            values = np.fromiter(held, np.uint64, len(held))[:, None]
            signature = (values * factors + shifts).min(0).reshape(BANDS, ROWS)  # modulo 2^64
            for band, row in enumerate(signature):
                groups.setdefault((band, row.tobytes()), []).append(number)
    return [group for group in groups.values() if len(group) > 1]
