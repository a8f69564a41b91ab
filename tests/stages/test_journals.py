"""Which journals of a stage are there, and for whom."""

import contextlib
import types

import pytest

from posttrain import lease, leftovers, workdir
from posttrain.episodes.call import Call, Result
from posttrain.stages import facts, journals
from posttrain.train import health, preemption


@pytest.fixture
def context(tmp_path, monkeypatch):
  monkeypatch.setattr(facts, "of_results", lambda context: {"seed": 3})
  run = workdir.Workdir(tmp_path)
  return types.SimpleNamespace(
      workdir=run, name="reason", directory=run.stage("reason"),
      renderer=types.SimpleNamespace(hash="of the renderer"),
      console=types.SimpleNamespace(line=lambda line: None))


def write(book):
  book.knows(0, Call("a:b"))
  book.write([(0, Result("ok", 1))])
  book.close()


def names(context):
  folder = context.directory / "journal"
  return sorted(path.relative_to(folder).as_posix()
                for path in folder.rglob("*") if path.is_file())


def test_a_batch_that_a_checkpoint_holds_has_no_journal(context):
  """Nor one before it; a checkpoint that is being written holds nothing."""
  books = journals.Journals(context)
  for step in (0, 2, 4):
    write(books.of_batch(step))
  assert names(context) == ["step_000000", "step_000002", "step_000004"]
  checkpoints = context.workdir.checkpoints("reason")
  (checkpoints / "3").mkdir(parents=True)
  (checkpoints / "5.orbax-checkpoint-tmp").mkdir()
  write(books.of_batch(6))
  assert names(context) == ["step_000004", "step_000006"]
  assert books.of_batch(4).replays and not books.of_batch(8).replays
  books.clear()
  assert not (context.directory / "journal").exists()


def test_a_journal_is_of_its_batch_and_its_settings(context):
  write(journals.Journals(context).of_batch(4))
  folder = context.directory / "journal"
  (folder / "step_000004").rename(folder / "step_000006")
  assert not journals.Journals(context).of_batch(6).replays
  write(journals.Journals(context).of_batch(8))
  context.renderer.hash = "of another"
  assert not journals.Journals(context).of_batch(8).replays


def test_a_cell_has_its_own(context):
  books = journals.Journals(context)
  write(books.of_cell("init", "no_budget"))
  assert names(context) == ["init/no_budget"]
  assert books.of_cell("init", "no_budget").replays
  assert not books.of_cell("reason", "no_budget").replays


@pytest.mark.parametrize("error, stays", [
    (health.HealthError("no judge"), False), (KeyboardInterrupt(), False),
    (preemption.Preempted("SIGTERM"), True), (lease.LostError("taken"), True),
    (None, False)])
def test_they_stay_for_the_next_start_unless_a_person_is_to_mend(
    context, error, stays):
  with contextlib.suppress(BaseException), journals.kept(context):
    write(journals.Journals(context).of_batch(4))
    if error:
      raise error
  assert names(context) == ["step_000004"] * stays


def test_other_hosts_have_none(context):
  context.workdir.is_writer = False
  books = journals.Journals(context)
  assert books.of_batch(0) is None and books.of_cell("init", "x") is None
  books.clear()


def test_a_journal_alone_is_no_training(context):
  """A first start that fails may be begun again with a corrected config.

  If nothing was corrected, that start goes on with what the calls gave.
  """
  books = journals.Journals(context)
  write(books.of_batch(0))
  write(books.of_cell("init", "no_budget"))
  path, saved = context.workdir.path, {"stages": ["reason"]}
  assert leftovers.is_untrained(path, saved, [{"versions": {}}])
  leftovers.clear(path, saved)
  assert names(context) == ["init/no_budget", "step_000000"]
