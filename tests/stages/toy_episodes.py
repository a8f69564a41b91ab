"""Episodes over the toy's words; the functions that they call are in `toy`."""

from posttrain.episodes.protocol import Call, Generate, Outcome, multi_turn

TOY = "tests.stages.toy"


@multi_turn
def two_turns(task):
  """Is told a word that depends on the first turn, and goes on."""
  turn = yield Generate(task.prompt)
  result = yield Call(f"{TOY}:opinion", (turn.text,))
  turn = yield Generate(task.encode(
      result.value or "no", turn), parent=turn)
  return Outcome()
