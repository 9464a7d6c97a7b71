"""The results file: each world once, cells in a stable order, and no cell lost."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from studies.results_file import add_result, read_results, write_results


def cell(arm: str, seed: int, world: str = "checked", experts: int = 100, accuracy: float = 0.1) -> dict:
    options = {"name": world, "experts": experts}
    return {"world": world, "seed": seed, "arm": arm, "world_options": options, "accuracy": accuracy}


def test_results_round_trip_exactly(tmp_path):
    results = [cell("SFT", 1, accuracy=0.1 + 0.2), cell("IRL", 0, experts=50), cell("SFT", 0), cell("SFT", 0, "style")]
    write_results(tmp_path / "x.jsonl", results)
    found = read_results(tmp_path / "x.jsonl")
    assert found == [results[1], results[2], results[0], results[3]]
    assert [list(result) for result in found] == [list(results[0])] * 4
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row.get("options", {}).get("experts") for row in rows] == [50, 100, 100, None, None, None, None]
    assert read_results(tmp_path / "y.jsonl") == []


def test_repeated_cell_replaces_its_row(tmp_path):
    for result in (cell("SFT", 0), cell("SFT", 1), cell("SFT", 0, experts=50, accuracy=0.2)):
        add_result(tmp_path / "x.jsonl", result)
    assert read_results(tmp_path / "x.jsonl") == [cell("SFT", 0, experts=50, accuracy=0.2), cell("SFT", 1)]


def test_incomplete_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    write_results(path, [cell("SFT", 0), cell("SFT", 1)])
    path.write_bytes(path.read_bytes()[:-20])
    assert read_results(path) == [cell("SFT", 0)]
    add_result(path, cell("SFT", 1))
    assert read_results(path) == [cell("SFT", 0), cell("SFT", 1)]


def test_concurrent_writes_keep_all_cells(tmp_path):
    results = [cell("SFT", seed) for seed in range(40)]
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        list(pool.map(partial(add_result, tmp_path / "x.jsonl"), results))
    assert read_results(tmp_path / "x.jsonl") == results
