"""Paths of parameters, and splitting of trees by path."""

from collections.abc import Iterable, Sequence
import re
from typing import Any

from flax import traverse_util
import jax


def split_frozen(
    params: Any, patterns: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into trainable and frozen ones.

  Args:
    params: the parameter tree, nested dicts.
    patterns: regular expressions that match the whole path of frozen
      parameters, such as 'encoder/patches/kernel'.

  Returns:
    The tree of trainable and the tree of frozen parameters; `merge_frozen` is
    the inverse.

  Raises:
    ValueError: a pattern matches no parameter, or all parameters are frozen.
  """
  leaves = traverse_util.flatten_dict(params, sep='/')
  check_patterns('frozen', patterns, leaves)
  frozen = {
      path for path in leaves if any(re.fullmatch(p, path) for p in patterns)
  }
  if len(frozen) == len(leaves):
    raise ValueError(
        f'optim.frozen is {tuple(patterns)}, which leaves no parameter to'
        ' train.'
    )
  trained, frozen = (
      {path: x for path, x in leaves.items() if (path in frozen) == side}
      for side in (False, True)
  )
  return (
      traverse_util.unflatten_dict(trained, sep='/'),
      traverse_util.unflatten_dict(frozen, sep='/'),
  )


def merge_frozen(trained: Any, frozen: Any) -> dict[str, Any]:
  """Merges the trees of `split_frozen`."""
  leaves = [traverse_util.flatten_dict(tree) for tree in (trained, frozen)]
  return traverse_util.unflatten_dict(leaves[0] | leaves[1])


def check_patterns(
    field: str, patterns: Sequence[str], paths: Iterable[str]
) -> None:
  """Raises a ValueError if a pattern of optim.FIELD matches no path."""
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise ValueError(
          f'optim.{field} has {pattern!r}, which matches no parameter; paths'
          f' look like {next(iter(paths))!r}.'
      )


def tree_paths(tree: Any) -> Any:
  """Returns the tree with its paths, as 'encoder/patches/kernel', as leaves."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'),
      tree,
  )
