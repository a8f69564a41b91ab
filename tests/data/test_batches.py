"""Oracles: the examples that went in, and the uninterrupted iterator."""

import collections
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import batches, examples
from posttrain.text import render
from tests.text import build

WORDS = build.words(" ".join(map(str, range(100))))
RENDERER = render.make_renderer(WORDS, "plain")


def write(path, sizes, first=0):
  """Row n is n many times over, so that an example names itself."""
  path.write_text("".join(
      json.dumps({"prompt": str(n), "completion": f"{n} " * (size - 2)}) + "\n"
      for n, size in enumerate(sizes, first)))
  return dict(path=str(path))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("data")
  return [
      dict(write(folder / "a.jsonl", rng.integers(3, 16, 30)), weight=3.0),
      dict(write(folder / "b.jsonl", rng.integers(3, 16, 7), 50), weight=1.0)]


def make(sources, **options):
  return batches.make_batches(sources, RENDERER, **(
      dict(sequence_length=16, rows=4, seed=0, stage="a") | options))


def segments(batch):
  """The examples of a batch, as the words that they consist of."""
  for row in range(len(batch["tokens"])):
    segment_ids = batch["segment_ids"][row]
    for segment in range(1, segment_ids.max() + 1):
      at = segment_ids == segment
      tokens, mask = batch["tokens"][row, at], batch["loss_mask"][row, at]
      np.testing.assert_array_equal(
          batch["positions"][row, at], np.arange(at.sum()))
      # One prompt token, then completion and EOS in the loss.
      assert mask.tolist() == [False] + [True] * (at.sum() - 1)
      assert tokens[-1] == WORDS.eos_id
      assert len(set(tokens[:-1].tolist())) == 1
      yield int(WORDS.decode(tokens[:1])), int(at.sum())


def test_an_epoch_has_every_example_once_and_the_next_another_order(sources):
  iterator = make(sources[:1])
  taken = [n for _ in range(60) for n, _ in segments(next(iterator))]
  # What waits may cross an epoch's edge: compare over whole passes.
  counts = collections.Counter(taken)
  assert set(counts) == set(range(30))
  assert max(counts.values()) - min(counts.values()) <= 1
  one, two = taken[:30], taken[30:60]
  assert one != two and one != sorted(one)


def test_the_shape_of_a_batch(sources):
  batch = next(make(sources))
  assert {name: (a.shape, str(a.dtype)) for name, a in batch.items()} == {
      name: ((4, 16), "bool" if name == "loss_mask" else "int32")
      for name in ("tokens", "positions", "segment_ids", "loss_mask")}
  assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_a_mixture_has_its_weights_in_any_stretch(sources):
  iterator = make(sources)
  taken = [n for _ in range(60) for n, _ in segments(next(iterator))]
  share = np.mean(np.array(taken) < 50)
  assert abs(share - 0.75) < 0.02
  assert iterator.report["sources"][0]["share_of_mixture"] == 0.75


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 12), after=st.integers(1, 6),
       packing=st.booleans())
def test_a_resumed_iterator_goes_on_as_if_never_stopped(
    sources, before, after, packing):
  one, two = make(sources, packing=packing), make(sources, packing=packing)
  for _ in range(before):
    next(one)
  state = json.loads(json.dumps(one.get_state()))
  next(two)  # Restoring forgets where an iterator was.
  two.set_state(state)
  assert two.get_state() == state and two.epoch == one.epoch
  for _ in range(after):
    expected, got = next(one), next(two)
    for name, array in expected.items():
      np.testing.assert_array_equal(got[name], array)


def test_batches_are_a_function_of_data_config_and_seed(sources):
  texts = lambda **options: [
      next(iterator)["tokens"].tolist()
      for iterator in [make(sources, **options)] for _ in range(4)]
  assert texts() == texts()
  assert texts(seed=1) != texts(seed=0)
  assert texts(stage="b") != texts(stage="a")
  # Seed 1 must not be what seed 0 is an epoch later.
  second_epoch = make(sources[:1], rows=1, packing=False, seed=0)
  for _ in range(30):
    next(second_epoch)
  other_seed = make(sources[:1], rows=1, packing=False, seed=1)
  assert [next(second_epoch)["tokens"].tolist() for _ in range(9)] != [
      next(other_seed)["tokens"].tolist() for _ in range(9)]


def test_a_state_of_other_data_is_refused(sources):
  state = make(sources).get_state()
  for changed in (dict(seed=1), dict(stage="b"), dict(rows=2),
                  dict(packing=False)):
    with pytest.raises(ValueError, match="other data"):
      make(sources, **changed).set_state(state)
  with pytest.raises(ValueError, match="other data"):
    make(sources[:1]).set_state(state)


def test_without_packing_a_row_holds_one_example_in_order(sources):
  iterator = make(sources[:1], packing=False, shuffle=False)
  taken = []
  for _ in range(20):
    batch = next(iterator)
    assert (batch["segment_ids"].max(axis=1) == 1).all()
    taken += [n for n, _ in segments(batch)]
  assert taken == [n % 30 for n in range(80)]


def test_waiting_is_short_and_packing_is_tight(sources):
  iterator = make(sources[:1], sequence_length=40, rows=4)
  for _ in range(50):
    next(iterator)
    assert len(iterator.get_state()["waiting"]) <= 4
  assert iterator.report["padding_share"] < 0.15


def test_evaluation_is_one_pass_in_order(sources):
  for packing in (True, False):
    held_out = batches.eval_batches(
        [{"path": source["path"]} for source in sources], RENDERER,
        sequence_length=16, rows=4, packing=packing)
    once = [n for batch in held_out for n, _ in segments(batch)]
    assert sorted(once) == [*range(30), *range(50, 57)]
    assert once == [n for batch in held_out for n, _ in segments(batch)]
    if not packing:
      assert once == sorted(once)
    filled = sum((b["segment_ids"] > 0).sum() for b in held_out)
    assert held_out.report["padding_share"] == pytest.approx(
        1 - filled / sum(b["tokens"].size for b in held_out))


def test_the_first_example_is_the_first_of_the_stream(sources):
  iterator = make(sources)
  tokens, mask = iterator.first_example
  first = next(iterator)
  np.testing.assert_array_equal(first["tokens"][0, :tokens.size], tokens)
  np.testing.assert_array_equal(first["loss_mask"][0, :tokens.size], mask)


def test_overlong_examples(tmp_path):
  source = write(tmp_path / "a.jsonl", [5, 20, 16, 17])
  with pytest.raises(ValueError, match=(
      r"2 of 4 rows have more than sequence_length=16 tokens \(.*a.jsonl:2: "
      r"20 tokens; .*a.jsonl:4: 17 tokens\). Raise")):
    make([source])
  dropped = make([source], on_overlong="drop").report
  assert (dropped["examples"], dropped["overlong"]) == (2, 2)
  assert [row["reason"] for row in dropped["dropped_rows"]] == [
      "20 tokens", "17 tokens"]
  cut = make([source], on_overlong="truncate")
  assert [row["reason"] for row in cut.report["truncated_rows"]] == [
      "20 tokens, kept 16", "17 tokens, kept 16"]
  assert not cut.report["dropped_rows"]
  assert set(segments(next(cut))) == {(0, 5), (1, 16), (2, 16), (3, 16)}


def test_a_prompt_that_fills_the_row_leaves_no_target(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"prompt": "1 " * 20, "completion": "2"}) + "\n")
  with pytest.raises(ValueError, match="no target token in the first 16"):
    make([dict(path=str(path))], on_overlong="truncate")
  with pytest.raises(ValueError, match="no example left"):
    make([dict(path=str(path))], on_overlong="truncate", on_no_target="drop")


def test_malformed_rows_stop_the_run_or_are_counted(tmp_path):
  source = write(tmp_path / "a.jsonl", [5, 6])
  with open(source["path"], "a") as file:
    file.write('{"prompt": "1"\n{"text": "1"}\n{"prompt": "", "completion": '
               '"2"}\n')
  with pytest.raises(ValueError, match=(
      r"3 of 5 rows cannot be used \(.*a.jsonl:3: not JSON.*; .*:4: the row "
      r"has text and no `prompt`.*; .*:5: the prompt has no tokens.*"
      'on_malformed="skip"')):
    make([source])
  report = make([source], on_malformed="skip").report
  assert (report["rows"], report["examples"], report["malformed"]) == (5, 2, 3)
  assert report["malformed_rows"][0]["place"] == f"{source['path']}:3"


def test_hostile_rows_stop_the_run_or_are_counted(tmp_path):
  source = write(tmp_path / "a.jsonl", [5, 6])
  with open(source["path"], "ab") as file:
    file.write(rb'{"prompt": "1 \ud800", "completion": "2"}' + b"\n"
               + b'{"prompt": "1", "completion": "2", "n": 1' + b"0" * 5000
               + b"}\n" + b"[" * 100_000 + b"\n")
  with pytest.raises(ValueError, match=(
      r"3 of 5 rows cannot be used \(.*a.jsonl:3: a text with '\\ud800'.*; "
      r".*:4: a whole number of more than.*; .*:5: nested.*"
      'on_malformed="skip"')):
    make([source])
  found = make([source], on_malformed="skip").report
  assert (found["rows"], found["examples"], found["malformed"]) == (5, 2, 3)


def test_rows_of_a_damaged_part_are_all_counted(tmp_path):
  path = tmp_path / "a.parquet"
  pyarrow.parquet.write_table(pyarrow.table({
      "prompt": [str(n) for n in range(60)],
      "completion": [f"{n} " * 5 for n in range(60)]}), path,
      row_group_size=20, write_page_checksum=True, use_dictionary=False)
  column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
  data = bytearray(path.read_bytes())
  end = column.data_page_offset + column.total_compressed_size
  data[end - 6:end] = b"\xa5" * 6
  path.write_bytes(data)
  source = dict(path=str(path))
  with pytest.raises(ValueError, match=(
      r"20 of 60 rows cannot be used \(.*a.parquet:20-39: a damaged part")):
    make([source])
  report = make([source], on_malformed="skip").report
  assert (report["rows"], report["examples"], report["malformed"]) == (
      60, 40, 20)


def test_what_is_only_warned_about(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(
      '{"prompt": "1", "prompt": "2", "completion": "3"}\n'
      '{"prompt": "zebra", "completion": "yak"}\n')
  iterator = make([dict(path=str(path))])
  assert iterator.report["repeated_keys"] == 1
  assert iterator.report["repeated_key_rows"] == [
      dict(place=f"{path}:1", reason="prompt")]
  unknown, twice = iterator.warnings
  assert f"{path}: 2 of 6 tokens (33.3%) stand for text" in unknown
  assert f"{path}: 1 rows name a key twice" in twice and (
      f"{path}:1: prompt" in twice)
  assert not make([write(tmp_path / "b.jsonl", [5, 6])]).warnings


def test_a_template_that_does_too_much_is_no_malformed_row(tmp_path):
  """It would otherwise be skipped, and on some hosts only."""
  (tmp_path / "t.jinja").write_text(
      "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}")
  renderer = render.make_renderer(WORDS, str(tmp_path / "t.jinja"))
  source = write(tmp_path / "a.jsonl", [5])
  with pytest.raises(ValueError, match=r"a.jsonl:1: the template .*t\.jinja "):
    batches.make_batches(
        [source], renderer, sequence_length=16, rows=4, seed=0, stage="sft",
        on_malformed="skip")


def test_the_report_adds_up(sources):
  report = make(sources, sequence_length=16).report
  json.dumps(report)
  sizes = [size for batch in batches.eval_batches(
      [{"path": source["path"]} for source in sources], RENDERER,
      sequence_length=16, rows=4) for _, size in segments(batch)]
  assert report["examples"] == report["rows"] == len(sizes) == 37
  assert report["tokens"] == sum(sizes)
  assert report["target_tokens"] == sum(sizes) - len(sizes)
  assert report["lengths"]["max"] == max(sizes)
  assert report["lengths"]["p50"] == np.percentile(sizes, 50)
  assert report["unknown_tokens"] == 0


def test_unknown_words_are_counted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "1 zebra 2", "completion": "yak"}\n')
  assert make([dict(path=str(path))]).report["unknown_tokens"] == 2


@given(mask=st.lists(st.booleans(), min_size=3, max_size=20),
       length=st.integers(2, 19))
def test_truncation_keeps_turns_that_end(mask, length):
  """Against the definition: whole turns, and a cut turn with its end."""
  mask = np.array([False, *mask])
  length = min(length, mask.size - 1)
  tokens = np.arange(mask.size, dtype=np.int32)
  cut, cut_mask = examples.truncate(tokens, mask, length)
  assert cut.size == cut_mask.size <= length
  # All but the last token are a prefix of the example.
  np.testing.assert_array_equal(cut[:-1], tokens[:cut.size - 1])
  np.testing.assert_array_equal(cut_mask, mask[cut])
  ends = np.flatnonzero(mask & ~np.append(mask[1:], False))
  if cut_mask.any():
    assert cut[-1] in ends


def test_options_are_checked(sources):
  with pytest.raises(ValueError, match=r"data\.on_overlong='cut' is not one"):
    make(sources, on_overlong="cut")
  with pytest.raises(ValueError, match=r"Set data\.sources"):
    make([])
