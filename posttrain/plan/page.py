"""The plan as one HTML file that needs nothing else."""

from collections.abc import Sequence

from posttrain.evaluation import markup
from posttrain.plan import report as report_lib
from posttrain.plan.plan import Plan

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


def render(plan: Plan, sweep: Sequence[report_lib.Table] = ()) -> str:
  """Renders the page; its JSON has every figure."""
  title = f"posttrain plan: {plan.setup.config.model} on {plan.topology}"
  items = lambda texts: markup.tag(
      "ul", *(markup.tag("li", text) for text in texts))
  advice = [markup.div("advice", markup.tag("h2", "What to change"),
                       items(plan.advice))] if plan.advice else []
  sections = [
      markup.tag("section", markup.tag("h2", table.title),
                 markup.table(table.header, table.rows), items(table.notes))
      for table in (*report_lib.tables(plan), *sweep)]
  body = markup.join([
      markup.tag("h1", title), items(report_lib.summary(plan)), *advice,
      *sections, markup.made_by("plan"),
      markup.json_script("plan", report_lib.all_figures(plan))])
  return markup.document(title, body, style=STYLE, policy=POLICY)
