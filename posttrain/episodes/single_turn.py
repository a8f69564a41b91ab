"""Single turn: one completion of the prompt, which its rewards judge."""

from posttrain.episodes.protocol import Episode, Generate, Outcome, Task


def single_turn(task: Task) -> Episode:
  """Asks for one completion of the task's prompt."""
  yield Generate(task.prompt)
  return Outcome()
