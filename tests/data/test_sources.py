"""Oracles: files written by hand, and the place of each of their faults."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from posttrain.data import sources

ROWS = [{"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "é"}]}]


def read(**fields):
  return list(sources.read(sources.Source(**fields)))


def test_jsonl_names_the_line_and_what_was_wrong(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_bytes(b"\n".join([
      json.dumps(ROWS[0]).encode(), b"", b'{"prompt": "a",}', b"[1]",
      b'{"prompt": "\xff"}', json.dumps(ROWS[1]).encode()]))
  places, rows = zip(*read(path=str(path)), strict=True)
  assert places == tuple(f"{path}:{n}" for n in (1, 3, 4, 5, 6))
  assert rows[0] == ROWS[0] and rows[4] == ROWS[1]
  assert rows[1].reason.startswith("not JSON: ") and "column" in rows[1].reason
  assert rows[2].reason == "a JSON list, and an object is needed"
  assert rows[3].reason == "not UTF-8: invalid start byte at byte 12"


def test_parquet_has_the_same_rows(tmp_path):
  path = tmp_path / "d.parquet"
  pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(ROWS, schema=pyarrow.schema([
          ("prompt", pyarrow.string()), ("completion", pyarrow.string()),
          ("messages", pyarrow.list_(pyarrow.struct([
              ("role", pyarrow.string()), ("content", pyarrow.string())])))])),
      path)
  assert read(path=str(path)) == [
      (f"{path}:0", ROWS[0]), (f"{path}:1", ROWS[1])]
  path.write_bytes(b"PAR0")
  with pytest.raises(ValueError, match="not a Parquet file"):
    read(path=str(path))


def test_a_task_is_called_with_split_and_args(tmp_path):
  path = tmp_path / "task.py"
  path.write_text(
      "def rows(split, n):\n"
      "  return [{'prompt': split, 'completion': str(i)} for i in range(n)]\n"
      "def bad(split):\n"
      "  return ['a']\n")
  assert read(task=f"{path}:rows", split="test", args={"n": 2}) == [
      (f"{path}:rows[test]:{i}", {"prompt": "test", "completion": str(i)})
      for i in range(2)]
  [(_, fault)] = read(task=f"{path}:bad")
  assert fault.reason == "a str, and a mapping is needed"
  with pytest.raises(ValueError, match=r"missing a required argument: 'n'"):
    read(task=f"{path}:rows")


def test_errors_name_the_key(tmp_path):
  with pytest.raises(ValueError, match=r"it needs one of them"):
    sources.Source()
  with pytest.raises(ValueError, match=r"weight 0"):
    sources.Source(path="a.jsonl", weight=0)
  with pytest.raises(ValueError, match=r"does not exist. Check data\.sources"):
    read(path=str(tmp_path / "a.jsonl"))
  with pytest.raises(ValueError, match=r"neither .jsonl nor .parquet"):
    read(path=str(tmp_path / "a.csv"))
