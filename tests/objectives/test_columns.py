"""Contract of an objective: what it reads is declared, what it returns fits."""

import jax
import jax.numpy as jnp
import pytest

from posttrain.objectives import columns as columns_lib
from posttrain.objectives.columns import Term, needs

ONES = jnp.ones((2, 3))
COLUMNS = {name: ONES for name in ("logprobs", "loss_mask", "advantages")}


@needs("advantages")
def declared(columns, *, scale):
  assert set(columns) == set(COLUMNS)
  return {"policy": Term(scale * jnp.sum(columns["advantages"]), 2.0)}, {}


def undeclared(columns):
  return {"policy": Term(jnp.sum(columns["advantages"]), 2.0)}, {}


def test_a_declared_column_and_args_arrive():
  terms, sums = columns_lib.call(declared, COLUMNS, dict(scale=3.0))
  assert terms["policy"].numerator == 18 and sums == {}
  assert terms["policy"].coefficient == 1.0


def test_an_undeclared_column_is_named_with_how_to_declare_it():
  with pytest.raises(ValueError, match=(
      r"reads the column 'advantages', and has logprobs|"
      r"reads the column 'advantages', and has loss_mask")) as caught:
    columns_lib.call(undeclared, COLUMNS, {})
  assert "@needs('advantages')" in str(caught.value)


def test_needs_names_columns_that_there_are():
  with pytest.raises(ValueError, match=r"needs names advantage; .* advantages"):
    needs("advantage")


@pytest.mark.parametrize("found", [
    (1.0, 2.0, {}), ({}, {}), ({"policy": (1.0, 2.0)}, {}), None,
    ({"policy": Term(ONES, 2.0)}, {}), ({"policy": Term(1.0, ONES)}, {}),
    ({"policy": Term(1.0, 2.0)}, {"ratio": ONES}),
    ({"policy": Term(1.0, 2.0, jnp.ones(()))}, {})])
def test_what_is_returned_must_be_terms_and_sums(found):
  with pytest.raises(ValueError, match=r"returns two dicts, \(terms, sums\)"):
    columns_lib.call(lambda columns: found, COLUMNS, {})


@pytest.mark.parametrize("name", [
    "loss", "grad_norm", "learning_rate", "spike", "loss/policy",
    "denominator/policy"])
def test_a_sum_does_not_replace_a_metric_of_the_update(name):
  found = {"policy": Term(1.0, 2.0)}, {name: jnp.float32(777)}
  with pytest.raises(ValueError, match=f"a sum '{name}', the name of a metric"):
    columns_lib.call(lambda columns: found, COLUMNS, {})


def test_a_term_is_a_pytree_with_a_fixed_coefficient():
  a, b = Term(1.0, 2.0, 0.5), Term(3.0, 4.0, 0.5)
  total = jax.tree.map(jnp.add, a, b)
  assert (total.numerator, total.denominator, total.coefficient) == (4, 6, 0.5)
