"""Chat templates: messages to tokens, with a mask of the assistant's tokens.

Templates are the Jinja sources that model publishers ship, rendered as
transformers renders them, in a sandbox with limits. Control tokens come from
the template's own text only: control strings inside messages are hidden from
the template behind Unicode noncharacters, and come back as ordinary text.

An assistant turn is the text from the end of the prompt that the sampler would
be given at that point to the turn's end-of-turn token, inclusive. That is exact
if the prompt is a prefix of the whole conversation; otherwise no mask is right,
and it is an error. A turn that has lost text is an error too, as Qwen 3's
template cuts the reasoning out of earlier turns. White space at the edges of a
turn may be removed by the template (Llama's and Gemma's trim it).

An assistant turn is cut at the thinking strings (see `posttrain.text.cuts`), in
prompts too: there its tokens may also be those that were sampled. The strings
themselves may then be control tokens. In other messages they stay text, and no
message opens the thinking: a prompt in which one would is an error.

Not done: images, tools, and a date. `strftime_now` always answers 26 July 2024
(the default of the Llama templates), so that a prompt is the same on every day.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from posttrain.text import cuts, sandbox
from posttrain.text import messages as messages_lib
from posttrain.text import thinking as thinking_lib
from posttrain.text import tokenizer as tokenizer_lib

Messages = Sequence[Mapping[str, Any]]
Sampled = Mapping[int, Sequence[int]]

# Noncharacters: no valid text has them. The first pair encloses the number of a
# control token in a message, the second the text of a {% generation %} block.
HIDE, HIDE_END = "\ufdd0", "\ufdd1"
TURN, TURN_END = sandbox.TURN_BEGIN, sandbox.TURN_END


class ChatTemplate:
  """A template and the tokenizer that its text is meant for.

  Attributes:
    source: the Jinja source.
  """

  def __init__(
      self, source: str, tokenizer: tokenizer_lib.Tokenizer,
      name: str = "the chat template",
      strings: thinking_lib.Thinking | None = None):
    """Compiles the template.

    Args:
      source: the Jinja source.
      tokenizer: the tokenizer that the template was made for.
      name: names the template in error messages.
      strings: at which the assistant's text is cut.

    Raises:
      ValueError: the source is not a Jinja template, or the tokenizer cannot
        spell a string.
    """
    self.source = source
    self._tokenizer = tokenizer
    # Longest first: one control token's text may begin another's.
    self._controls = sorted(tokenizer.controls, key=len, reverse=True)
    self._hidden = re.compile(f"{HIDE}(\\d+){HIDE_END}")
    stops = [text for text, i in tokenizer.controls.items()
             if i in tokenizer.stop_ids]
    self._stop = re.compile("|".join(
        re.escape(text) for text in sorted(stops, key=len, reverse=True)))
    self._control = re.compile(
        f"({'|'.join(map(re.escape, self._controls))})")
    self._template = sandbox.Template(source, name)
    self._strings = strings or thinking_lib.Thinking()
    self._cuts = cuts.Cuts(self._strings, tokenizer, self._pattern)

  def render(self, messages: Messages, add_generation_prompt: bool) -> str:
    """Renders the text, as transformers' `apply_chat_template` does."""
    return self._reveal(self._render(messages, add_generation_prompt)[0])

  def prompt_tokens(
      self, messages: Messages, sampled: Sampled = MappingProxyType({}),
  ) -> list[int]:
    """Tokenizes the messages and the generation prompt, for the sampler.

    Args:
      messages: the last one is not the assistant's.
      sampled: number of an assistant's message -> the ids that were sampled as
        it. They are used if they spell what the template writes for the turn,
        so that a prompt begins with the tokens of the turn before. A template
        may rewrite the turn, as those do that cut earlier reasoning out: then
        its text is encoded.

    Raises:
      ValueError: the template refuses the messages, or the last one is an
        assistant's, or a message opens the thinking.
    """
    if not messages or messages[-1]["role"] == "assistant":
      raise ValueError(
          "a prompt needs a last message that is not the assistant's, and "
          f"this one has {len(messages)} message(s). Move the answer to "
          "`completion`.")
    text, _ = self._render(messages, True)
    self._check_opening(text, messages)
    return self._encode(text, messages, frozenset(), sampled)[0]

  def example_tokens(
      self, messages: Messages, *, last_only: bool = False,
  ) -> tuple[list[int], list[bool]]:
    """Tokenizes a whole conversation, with its loss mask.

    Args:
      messages: a conversation with at least one message of the assistant's.
      last_only: put only the last assistant turn in the loss.

    Returns:
      Token ids, and a mask of the same length: true on each assistant turn
      and its end-of-turn token, and on nothing else.

    Raises:
      ValueError: the template refuses the messages, or does not allow an
        exact mask.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
      raise ValueError(
          "the conversation has no assistant message, so nothing to learn.")
    text, marked = self._render(messages, False)
    if marked:
      self._check_marked(text, marked, messages, turns)
    targets = frozenset(turns[-1:] if last_only else turns)
    return self._encode(text, messages, targets)

  def _render(
      self, messages: Messages, add_generation_prompt: bool,
  ) -> tuple[str, list[tuple[int, int]]]:
    """Renders with hidden message content; returns {% generation %} spans too.
    """
    text = self._template.render(
        messages=[self._hide(_reasoning(message)) for message in messages],
        add_generation_prompt=add_generation_prompt, tools=None,
        documents=None, **self._tokenizer.named)
    return _unmark(text)

  def _check_opening(self, text: str, messages: Messages) -> None:
    """Checks that no message ends a prompt in `start`; a template may."""
    start, last = self._strings.start, messages[-1]
    opens = lambda text: messages_lib.opening(text, start) >= 0
    if not (self._strings.end and opens(text) and opens(last["content"])):
      return
    closed = {**last, "content": f"{last['content']}."}
    if not opens(self._render([*messages[:-1], closed], True)[0]):
      raise ValueError(
          f"the last message ends in thinking.start={start!r}, and the chat "
          "template writes nothing behind it, so that the message would open "
          "the thinking. Take it out of the message, or out of the thinking "
          "strings.")

  def _encode(
      self, text: str, messages: Messages, targets: frozenset[int],
      sampled: Sampled = MappingProxyType({}),
  ) -> tuple[list[int], list[bool]]:
    """Encodes turn by turn: no token straddles the start of a turn.

    The sampler's prompt ends where a turn starts. A token across that edge
    would be in training and never in sampling.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for piece, turn in self._pieces(text, messages, targets):
      tokens = (self._encode_piece(piece, ids[-1:]) if turn is None else
                self._encode_turn(piece, ids[-1:], sampled.get(turn, ())))
      ids += tokens
      mask += [turn in targets] * len(tokens)
    # Some templates write BOS and some leave it to the tokenizer.
    bos = self._tokenizer.bos_id
    if bos is not None and ids[:1] != [bos]:
      ids, mask = [bos, *ids], [False, *mask]
    # If BOS is a stop token too, it also ends turns: count at the start only.
    many = ids[:2] if bos in self._tokenizer.stop_ids else ids
    if bos is not None and many.count(bos) != 1:
      raise ValueError(
          f"the chat template writes BOS {many.count(bos)} times, and a text "
          "has one. Correct the template (chat_template).")
    return ids, mask

  def _pieces(
      self, text: str, messages: Messages, targets: frozenset[int],
  ) -> Iterator[tuple[str, int | None]]:
    """Cuts a text at assistant turns; yields pieces, and numbers of turns."""
    done = 0
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      span = self._locate(text, messages, i)
      if i in targets:
        if isinstance(span, str):
          raise _inexact(i, span)
        self._check_turn(text[span[0]:span[1]], messages, i)
      # In a prompt, and outside the loss, a turn that cannot be located is
      # encoded with its surroundings.
      if not isinstance(span, str) and span[0] >= done:
        yield text[done:span[0]], None
        yield text[span[0]:span[1]], i
        done = span[1]
    yield text[done:], None

  def _locate(
      self, text: str, messages: Messages, i: int) -> tuple[int, int] | str:
    """Locates turn i in the text, its end-of-turn included; or says why not."""
    if i == 0:
      return "comes first, with no prompt before it"
    # Rendered again for each turn: a template may render a message in another
    # way when more follow, and then the sampler's prompt was another text.
    prompt, _ = self._render(messages[:i], True)
    if not text.startswith(prompt):
      return ("does not begin behind the generation prompt: the conversation "
              f"has {_parting(text, prompt)}")
    stop = self._stop.search(text, len(prompt))
    if stop is None:
      return (f"does not end in a stop token {self._stop.pattern}, so that "
              "its end would not be learnt")
    return len(prompt), stop.end()

  def _check_turn(self, turn: str, messages: Messages, i: int) -> None:
    """Checks that a turn has all of its message, and no role header."""
    message = self._hide(_reasoning(messages[i]))
    # Without white space, which templates trim and add.
    squeezed = "".join(turn.split())
    for key in ("reasoning_content", "content"):
      wanted = "".join((message.get(key) or "").split())
      if wanted not in squeezed:
        raise _inexact(i, (
            f"loses text: its `{key}` is not all there (some templates cut "
            "the reasoning out of earlier turns: make one example per "
            "assistant turn)"))
    # The text before the content: a header of the turn (a control token, or any
    # text if the template has no generation prompt) must not be in the loss.
    lead = header = squeezed[:squeezed.index(wanted)]
    for string in (self._strings.start, self._strings.end):
      if string:  # Templates write these around the reasoning.
        header = header.replace("".join(string.split()), "")
    without = self._render(messages[:i], False)[0]
    ignored = without == self._render(messages[:i], True)[0]
    if self._control.search(header) or (ignored and lead):
      raise _inexact(i, (
          f"has {lead!r} before its text, which belongs to the generation "
          "prompt"))

  def _check_marked(self, text, marked, messages, turns):
    """Checks that the template's own {% generation %} marks agree.

    A mark may begin with the generation prompt and end in white space, as
    SmolLM3's do; neither is in the loss.
    """
    spans = [self._locate(text, messages, i) for i in turns]
    agree = len(marked) == len(spans) and all(
        not isinstance(span, str)
        and len(self._render(messages[:i], False)[0]) <= mark[0] <= span[0]
        and mark[1] >= span[1] and not text[span[1]:mark[1]].strip()
        for mark, span, i in zip(marked, spans, turns, strict=True))
    if not agree:
      raise ValueError(
          "the chat template's {% generation %} blocks cover characters "
          f"{marked}, and the assistant turns with their end-of-turn tokens "
          f"are {spans}. Correct the blocks (chat_template).")

  def _encode_turn(
      self, text: str, before: list[int], sampled: Sequence[int],
  ) -> list[int]:
    """Encodes an assistant turn, or takes the ids that were sampled as it.

    Args:
      text: the turn, end-of-turn token included.
      before: the token before it, if any.
      sampled: with or without an end-of-turn token.
    """
    tokenizer, whole = self._tokenizer, self._reveal(text)
    if sampled:
      # With the token before: a tokenizer may drop a space at the start.
      lead = len(tokenizer.decode(before))
      written = tokenizer.decode([*before, *sampled])[lead:]
      ended = sampled[-1] in tokenizer.stop_ids
      rest = whole.removeprefix(written)
      if whole == written + rest and (
          not rest if ended else self._stop.fullmatch(rest)):
        return [*sampled, *tokenizer.encode(
            rest, special=True, after=sampled[-1])]
    ids: list[int] = []
    for piece, spelt in self._cuts.pieces(text):
      ids += spelt or self._encode_piece(piece, (before + ids)[-1:])
    return ids

  def _pattern(self, text: str) -> str:
    """Makes the pattern of a string, whose controls a message has hidden."""
    number = {control: i for i, control in enumerate(self._controls)}
    return "".join(
        f"(?:{re.escape(part)}|{HIDE}{number[part]}{HIDE_END})"
        if part in number else re.escape(part)
        for part in self._control.split(text))

  def _encode_piece(self, text: str, before: list[int]) -> list[int]:
    """Encodes a piece behind the token before it, if there is one."""
    after = before[0] if before else None
    if HIDE not in text:
      return self._tokenizer.encode(text, special=True, after=after)
    # Control tokens of the template are found first; the hidden ones become
    # text again only after that, and are encoded as text.
    ids: list[int] = []
    for part in filter(None, self._control.split(text)):
      control = self._tokenizer.controls.get(part)
      ids += ([control] if control is not None else self._tokenizer.encode(
          self._reveal(part), after=after))
      after = ids[-1] if ids else after
    return ids

  def _hide(self, value: Any) -> Any:
    """Replaces control strings in every string of a message by noncharacters.
    """
    if isinstance(value, Mapping):
      return {key: self._hide(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return [self._hide(item) for item in value]
    if not isinstance(value, str):
      return value
    if any(mark in value for mark in (HIDE, HIDE_END, TURN, TURN_END)):
      raise ValueError(
          "a message has one of the Unicode noncharacters U+FDD0 to U+FDD3, "
          "which no valid text has. Remove it.")
    messages_lib.check_text(value, "a message")
    for number, control in enumerate(self._controls):
      value = value.replace(control, f"{HIDE}{number}{HIDE_END}")
    return value

  def _reveal(self, text: str) -> str:
    return self._hidden.sub(lambda m: self._controls[int(m[1])], text)


def _reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
  """Gives a message's reasoning every name by which templates read it."""
  found = next((message[key] for key in messages_lib.REASONING
                if message.get(key) is not None), None)
  if found is None:
    return dict(message)
  return {"thinking": found, **message, "reasoning_content": found}


def _unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
  """Removes the generation marks, and returns where they were."""
  spans: list[tuple[int, int]] = []
  clean = ""
  start = 0
  for part in re.split(f"({TURN}|{TURN_END})", text):
    if part == TURN:
      start = len(clean)
    elif part == TURN_END:
      spans.append((start, len(clean)))
    else:
      clean += part
  return clean, spans


def _parting(text: str, prompt: str) -> str:
  """Shows where two texts begin to differ, for an error message."""
  same = next(
      (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b),
      min(len(text), len(prompt)))
  return (f"{text[max(same - 10, 0):same + 20]!r} where the prompt has "
          f"{prompt[max(same - 10, 0):same + 20]!r}")


def _inexact(i: int, reason: str) -> ValueError:
  return ValueError(
      f"the chat template does not allow an exact loss mask: message {i}, "
      f"an assistant turn, {reason}. Choose another chat_template.")
