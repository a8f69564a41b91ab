"""Oracles: files written by hand, and the place of each of their faults."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.data import sources
from posttrain.tasks import jsonl

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


@pytest.mark.parametrize("line, reason", [
    (rb'{"prompt": "a \ud800 b"}', "a text with '\\ud800', half of a sur"),
    (rb'{"m": [{"k": ["\uDFFF"]}]}', "a text with '\\udfff', half of a"),
    (rb'{"\ud800": 1}', "a text with '\\ud800'"),
    (b'{"n": 1' + b"0" * 5000 + b"}", "a whole number of more than 4,300"),
    (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
    (b'{"x": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100 deep"),
    (b'{"x": ' + b'{"y": ' * 101 + b"1" + b"}" * 102, "nested more than 100"),
    (b"\0\0{\0}\0", "not JSON"), (b'{"a": 1}\0', "not JSON"),
])
def test_a_hostile_line_is_one_faulty_row(tmp_path, line, reason):
  """The rows around it are read; a pair of surrogates is a character."""
  path = tmp_path / "d.jsonl"
  right = rb'{"prompt": "\ud83d\ude42", "x": %s}' % (b"[" * 99 + b"]" * 99)
  path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([right, line, right]))
  (_, first), (place, fault), (_, last) = read(path=str(path))
  assert first == last and first["prompt"] == "\U0001f642"
  assert place == f"{path}:2" and reason in fault.reason


def test_a_key_that_is_named_twice(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_text(
      '{"prompt": "a", "m": [{"k": 1, "k": 2, "j": 0}], "prompt": "b"}\n'
      '{"prompt": "a", "m": {"prompt": "b"}}\n')
  (_, twice), (_, once) = read(path=str(path))
  assert isinstance(twice, jsonl.Repeated) and twice.keys_twice == (
      "k", "prompt")
  assert twice == {"prompt": "b", "m": [{"k": 2, "j": 0}]}  # As Python's.
  assert not isinstance(once, jsonl.Repeated)


@pytest.mark.parametrize("suffix", sources.FORMATS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, suffix):
  """A pipe that nobody writes to would be waited for for ever."""
  pipe, folder = tmp_path / f"pipe{suffix}", tmp_path / f"folder{suffix}"
  os.mkfifo(pipe)
  folder.mkdir()
  with pytest.raises(ValueError, match=r"pipe.* is no regular file\. Check"):
    read(path=str(pipe))
  with pytest.raises(ValueError, match=r"folder.* is a directory\. Check"):
    read(path=str(folder))
  link = tmp_path / f"link{suffix}"
  link.symlink_to(pipe)
  with pytest.raises(ValueError, match="no regular file"):
    read(path=str(link))


def texts(*values: bytes) -> pyarrow.Array:
  """A column of texts whose bytes nobody has looked at."""
  raw = pyarrow.array(values, pyarrow.binary())
  return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())


def test_parquet_that_is_not_utf_8_is_one_faulty_row(tmp_path):
  path = tmp_path / "d.parquet"
  nested = pyarrow.StructArray.from_arrays(
      [texts(b"x", b"y", b"z\xff")], ["content"])
  pyarrow.parquet.write_table(pyarrow.table({
      "prompt": texts(b"a", b"b\xffc", b"d"), "m": nested}), path)
  rows = read(path=str(path))
  assert [place for place, _ in rows] == [f"{path}:{n}" for n in range(3)]
  assert rows[0][1] == {"prompt": "a", "m": {"content": "x"}}
  assert rows[1][1].reason == "not UTF-8: invalid start byte at byte 1"
  assert rows[2][1].reason == "not UTF-8: invalid start byte at byte 1"


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_page_of_parquet_costs_the_rest_of_its_group(
    tmp_path, checksums):
  path = tmp_path / "d.parquet"
  table = pyarrow.table({"prompt": [f"row {n} " * 20 for n in range(300)]})
  pyarrow.parquet.write_table(
      table, path, row_group_size=100, write_page_checksum=checksums,
      use_dictionary=False, compression="gzip")
  column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
  data = bytearray(path.read_bytes())
  end = column.data_page_offset + column.total_compressed_size
  data[end - 60:end - 20] = b"\xa5" * 40
  path.write_bytes(data)
  rows = read(path=str(path))
  assert len(rows) == 201
  place, fault = rows[100]
  assert place == f"{path}:100-199" and fault.rows == 100
  assert fault.reason.startswith("a damaged part of the file (")
  assert rows[99] == (f"{path}:99", {"prompt": "row 99 " * 20})
  assert rows[101] == (f"{path}:200", {"prompt": "row 200 " * 20})


def test_parquet_whose_footer_is_damaged_is_refused(tmp_path):
  path = tmp_path / "d.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 9}), path)
  data = bytearray(path.read_bytes())
  footer = int.from_bytes(data[-8:-4], "little")
  data[-8 - footer:-footer + 12] = b"\xff" * 20
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"d\.parquet is not a Parquet file"):
    read(path=str(path))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_no_damage_of_parquet_loses_a_row(tmp_path, compression):
  """Bytes changed at random: each row is read or faulty, or the file refused.

  Another letter in a text cannot be seen, where pages have no checksum.
  """
  path, count = tmp_path / "d.parquet", 60
  pyarrow.parquet.write_table(pyarrow.table({
      "prompt": [f"row {n} é" for n in range(count)],
      "messages": [[{"role": "user", "content": str(n)}] for n in range(count)],
  }), path, row_group_size=20, compression=compression)
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  refused = faulty = 0
  for _ in range(200):
    data = bytearray(whole)
    data[rng.integers(len(data))] = rng.integers(256)
    path.write_bytes(data)
    try:
      rows = [row for _, row in read(path=str(path))]
    except ValueError as error:
      assert str(error).startswith(f"{path} is ")
      refused += 1
    else:
      faults = [row.rows for row in rows if isinstance(row, sources.Fault)]
      assert sum(faults) + len(rows) - len(faults) == count
      faulty += bool(faults)
  assert refused > 20 and (faulty > 0 or compression == "none")
