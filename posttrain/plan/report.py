"""A plan as tables for the console and the page, and as JSON.

Every column says where its figures come from:

  HLO       measured: read from the compiled program
  compiler  measured: what the compiler says of its buffers
  shapes    exact: from the shapes and layouts of arrays
  modelled  computed here, under the assumptions that are printed with them
"""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation import markup
from posttrain.plan import kernels, roofline
from posttrain.plan.measure import Result
from posttrain.plan.plan import Plan
from posttrain.programs.program import SAMPLING, TRAINING, shard_bytes
from posttrain.stages.stage import stage_of
from posttrain.telemetry.memory import format_bytes

NONE = "-"

# Of the page.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; color-scheme: light dark; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8884;
  text-align: right; vertical-align: bottom; }
th.word, td.word { text-align: left; }
.scroll { overflow-x: auto; }
.advice { border-left: .3rem solid #c60; padding-left: 1rem; }
footer { margin-top: 3rem; opacity: .7; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Table:
  title: str
  header: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]
  notes: tuple[str, ...] = ()


def summary(plan: Plan) -> list[str]:
  """The first lines of a plan."""
  chip, model = plan.topology.chip, plan.setup.model
  some = f" (of the programs with {plan.only} in their name)" if (
      plan.only) else ""
  return [
      f"{plan.topology}: {plan.topology.num_chips} chips, "
      f"{plan.topology.num_devices} devices with "
      f"{format_bytes(chip.hbm_bytes)} each; " + "; ".join(
          (f"{role} on " if len(plan.roles) > 1 else "mesh ") + _mesh(sizes)
          for role, sizes in plan.roles.items()),
      f"{plan.setup.config.model}: {model.num_parameters:,} parameters, "
      f"{model.dtype}, remat {model.remat}",
      *plan.setup.notes,
      f"fits: {'yes' if plan.fits else 'NO'}{some}"]


def tables(plan: Plan) -> list[Table]:
  """All figures of a plan, as tables."""
  return [
      _memory(plan.results), *_roles(plan),
      _work(plan.results, plan.setup.model.num_experts),
      _collectives(plan.results), _times(plan), _padding(plan),
      *_transposes(plan.results)]


def _mesh(sizes: Mapping[str, int]) -> str:
  return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _roles(plan: Plan) -> list[Table]:
  """Tables of each role's memory, and of the bytes sent between them."""
  if len(plan.roles) == 1:
    return []
  rows = []
  for role, sizes in plan.roles.items():
    own = [r for r in plan.results if r.program.role == role]
    if own:
      worst = max(own, key=lambda result: result.memory.total)
      rows.append((
          role, str(math.prod(sizes.values())), _mesh(sizes),
          format_bytes(worst.memory.total),
          format_bytes(worst.memory.available), worst.name))
  moved = [(each.stage, *map(format_bytes, each.bytes.values()))
           for each in plan.transfers]
  return [
      Table("Roles", ("role", "devices", "mesh", "most that a device needs",
                      "available", "for"), rows),
      Table("Weights to the devices that sample (modelled)", (
          "stage", "each receives (shapes)", "one sends at most",
          "each receives first", "one sends first"), moved, (
              "before each batch of rollouts, and what is frozen with the "
              "first; by device",
              "gathers on the devices that train and fingerprints on both are "
              "programs; copies between devices have no bound here, as no "
              "rate of them is published",
              "casts, cuts and joins of single arrays are not compiled: at "
              "most one array is there twice for them"))]


def _memory(results: Sequence[Result]) -> Table:
  size = lambda value: NONE if value is None else format_bytes(value)
  rows = [(
      result.name, "yes" if result.fits else "NO", size(m.arguments),
      size(m.padded_arguments), size(m.temporaries), size(m.peak),
      size(sum(m.beside.values())), size(m.total), size(m.available))
      for result in results for m in [result.memory]]
  held = sorted({name for r in results for name in r.memory.beside})
  waiting = {name: size(shard_bytes(tree)) for r in results
             for name, tree in r.program.waiting.items()}
  return Table(
      "Bytes per device", (
          "program", "fits", "arguments (shapes)", "with tiles (compiler)",
          "temporaries (compiler)", "peak (compiler)", "beside (shapes)",
          "peak + beside", "available"), rows, (
              "peak has the arguments in it, and may be less than arguments "
              "and temporaries together, which share buffers",
              *([f"beside: {', '.join(held)}, on the device while the program "
                 "runs and no argument of it"] if held else ()),
              *(f"{name}: {each} per device are in the host's memory but for "
                "the programs that take it (compute.offload)"
                for name, each in sorted(waiting.items())),
              *(f"{r.name}: {r.error}" for r in results if r.error),
              *(f"{r.name} is the program of {r.same_as}"
                for r in results if r.same_as)))


def _work(results: Sequence[Result], experts: int) -> Table:
  rows: list[tuple[str, ...]] = []
  uncounted: set[str] = set()
  for result in results:
    counts = result.counts
    if counts is None:
      rows.append((result.name, *(NONE,) * 5))
      continue
    uncounted |= set(counts.uncounted)
    rows.append((
        result.name, f"{counts.dot_flops / 1e12:.4g}",
        f"{counts.kernel_flops / 1e12:.4g}", format_bytes(counts.hbm_bytes),
        str(len(counts.transposes)), f"{result.seconds:.0f} s"))
  notes = [
      "FLOPs have loops multiplied out; a multiplication and an addition are "
      "two; products of one row, which the vector unit does, are among them",
      "a decode program is counted with all steps of its chunk",
      "HBM bytes: operands and results of what is not fused, with tiles' "
      "padding, in-place updates at their own size; what the compiler keeps "
      "on the chip over a loop is read once, and what it does not is read in "
      "each iteration",
      f"attention kernels are counted as causal, {kernels.VISIBLE:.0%} of the "
      "pairs",
      *(["products by expert are kernels, counted as 2 x rows x in x out of a "
         "device's share of the experts, as if the router were balanced; "
         "gradients of the experts' weights are not, and are among the dots"]
        if experts else [])]
  if uncounted:
    notes.append("kernels that are in no figure: " + ", ".join(
        sorted(uncounted)))
  if any(result.program.unknown_trips and result.program.phase != SAMPLING
         for result in results):
    notes.append(
        "the number of microbatches is an argument of the program, taken from "
        "the config; of packed completions it is the most there can be")
  return Table(
      "Work of one run, per device", (
          "program", "dot TFLOP (HLO)", "kernels TFLOP (modelled)",
          "HBM (HLO)", "transposes beside weight gradients (HLO)",
          "compiled in (measured)"), rows, tuple(notes))


def _collectives(results: Sequence[Result]) -> Table:
  rows = [(
      result.name, each.kind, each.axis + (
          ", across slices" if each.across_slices else ""),
      str(each.group_size), f"{each.count:,}", format_bytes(each.bytes))
      for result in results if result.counts
      for each in result.counts.collectives]
  return Table(
      "Collectives of one run (HLO)",
      ("program", "kind", "axis", "devices", "count", "bytes"), rows,
      ("bytes of the whole that is gathered, reduced or sent, summed over "
       "runs",))


def _times(plan: Plan) -> Table:
  rows: list[tuple[str, ...]] = []
  for result in plan.results:
    t = result.times
    if t is None:
      rows.append((result.name, *(NONE,) * 7))
      continue
    rows.append((
        result.name, *map(seconds, (t.matrix, t.memory, t.ici, t.dcn)),
        seconds(t.bound), t.limited_by, f"{result.program.calls:g}"))
  notes = []
  for stage in plan.setup.config.stages:
    total = plan.step_seconds(stage)
    if total is not None:
      samples = stage_of(plan.setup.config[stage].kind).schema.samples
      what = "batch of rollouts with its updates" if samples else "update"
      notes.append(
          f"{stage}: one {what} takes at least {seconds(total)} (modelled)"
          + ", if all completions run to their maximum" * samples
          + _overlap(plan, stage))
  notes += dict.fromkeys(
      f"{result.program.stage}: {result.program.note}"
      for result in plan.results if result.program.note)
  return Table(
      "Roofline (modelled)", (
          "program", "matrix unit", "memory", "ICI", "DCN", "bound",
          "limited by", "calls a step"), rows,
      (*notes, *(f"assumed: {text}" for text in roofline.ASSUMPTIONS)))


def _overlap(plan: Plan, stage: str) -> str:
  """Combines the times of two roles into a step's."""
  times = {role: plan.role_seconds(stage, role) for role in plan.roles}
  known = [f"{role} {seconds(value)}" for role, value in times.items()
           if value is not None]
  if len(known) < 2:
    return ""
  how = "at once, so the longer" if plan.overlaps(stage) else "in turn"
  return f": {' and '.join(known)}, {how}"


def _padding(plan: Plan) -> Table:
  rows = [(f"{each.stage}: {each.what}",
           NONE if each.share is None else f"{each.share:.1%}")
          for each in plan.padding]
  return Table(
      "Padding for the lengths in the data",
      ("stage", "wasted (measured)"), rows,
      tuple(f"{each.stage}, {each.what}: {each.text}"
            for each in plan.padding))


def _transposes(results: Sequence[Result]) -> list[Table]:
  rows = [(result.name, each.name, each.shape, str(each.count),
           format_bytes(each.bytes))
          for result in results if result.counts
          for each in result.counts.transposes]
  return [Table(
      "Transposes beside weight gradients (HLO)",
      ("program", "instruction", "shape", "count", "bytes of one"),
      rows)] if rows else []


def seconds(value: float) -> str:
  """Formats a time: `0.0123` -> "12.3 ms"."""
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if value >= size:
      return f"{value / size:.3g} {unit}"
  return f"{value / 1e-6:.3g} us"


def as_json(plan: Plan) -> dict[str, Any]:
  """The figures that scripts compare, see docs/pods.md."""
  return {
      "topology": str(plan.topology),
      "devices": plan.topology.num_devices,
      "programs": [_program_json(result) for result in plan.results]}


def _program_json(result: Result) -> dict[str, Any]:
  counts = result.counts
  return {
      "name": result.name, "fits": result.fits,
      "bytes_per_device": result.memory.total,
      "hbm_bytes_available": result.memory.available,
      "dot_flops": counts.dot_flops if counts else None,
      "collectives": [
          dataclasses.asdict(each) for each in counts.collectives]
      if counts else [],
      "roofline_s": result.times.bound if result.times else None}


def all_figures(plan: Plan) -> dict[str, Any]:
  """`as_json` with everything else that the tables show."""
  found = as_json(plan)
  for row, result in zip(found["programs"], plan.results, strict=True):
    row |= {
        "measured": {
            "memory": dataclasses.asdict(result.memory),
            "counts": result.counts and dataclasses.asdict(result.counts),
            "compile_s": result.seconds, "same_as": result.same_as,
            "error": result.error},
        "modelled": {
            "seconds": result.times and dataclasses.asdict(result.times),
            "calls_per_step": result.program.calls,
            "role": result.program.role,
            "assumptions": list(roofline.ASSUMPTIONS)}}
  return found | {
      "mesh": plan.roles[TRAINING],
      "sampling_mesh": plan.roles.get(SAMPLING),
      "transfers": [
          {"stage": each.stage, **each.bytes} for each in plan.transfers],
      "notes": list(plan.setup.notes),
      "padding": [dataclasses.asdict(each) for each in plan.padding],
      "advice": plan.advice, "modelled": {"step_s": {
          stage: plan.step_seconds(stage)
          for stage in plan.setup.config.stages}}}


def lines(table: Table) -> list[str]:
  """Formats a table for a console, with columns as wide as their cells."""
  wrapped = [
      textwrap.wrap(each, 12, break_long_words=False, break_on_hyphens=False)
      for each in table.header]
  height = max(map(len, wrapped))
  header = [
      tuple(column[i - height] if i - height >= -len(column) else ""
            for column in wrapped) for i in range(height)]
  widths = [max(len(row[i]) for row in (*header, *table.rows))
            for i in range(len(table.header))]
  draw = lambda row: "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
  return [
      "", f"== {table.title} ==", *map(draw, header),
      *map(draw, table.rows), *(f"  - {note}" for note in table.notes)]


def page(plan: Plan, sweep: Sequence[Table] = ()) -> str:
  """Renders one HTML file that needs nothing else; its JSON has every figure.
  """
  title = f"posttrain plan: {plan.setup.config.model} on {plan.topology}"
  items = lambda texts: markup.tag(
      "ul", *(markup.tag("li", text) for text in texts))
  advice = [markup.div("advice", markup.tag("h2", "What to change"),
                       items(plan.advice))] if plan.advice else []
  sections = [
      markup.tag("section", markup.tag("h2", table.title),
                 markup.table(table.header, table.rows), items(table.notes))
      for table in (*tables(plan), *sweep)]
  body = markup.join([
      markup.tag("h1", title), items(summary(plan)), *advice,
      *sections, markup.made_by("plan"),
      markup.json_script("plan", all_figures(plan))])
  return markup.document(title, body, style=STYLE, policy=POLICY)
