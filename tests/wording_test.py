"""Texts use the field's terms: idioms of our own are counted and kept rare."""

import ast
import collections
import io
import pathlib
import re
import tokenize

_ROOT = pathlib.Path(__file__).parents[1]
# Per 100 lines of docstrings, comments and Markdown.
_MOST_PER_HUNDRED = 0.5

# What is written instead of a term of the field or of a plain clause, and what
# to write. Compared without regard to case.
_IDIOMS = {
    # Clauses without a noun.
    r'\bthose (?:of|in|that|with|which|from|on|for)\b': 'name the noun',
    r'\bthat of\b': 'name the noun',
    r'\b(?:one|ones) (?:that|which|whose)\b': 'name the noun',
    r'(?:^|[.:;,(] )[Oo]f which\b': 'name the noun',
    r'\bwhat (?:is|are|was|were|has|have|no|it|else|a|an|the|they|one)\b': (
        'name the noun'
    ),
    r'\bis none\b|\bthere is none\b|\bare none\b|\bhas none\b': (
        'has no ..., is not set, is None'
    ),
    r'\bthe others\b|\bthe rest of them\b': 'name them',
    r'\bsuch (?:a|an) one\b|\bany such\b': 'name the noun',
    r'\bby what\b|\bof what\b|\bfrom what\b|\bas what\b|\bto what\b': (
        'name the noun'
    ),
    r'\bnothing yet\b': 'functions are compiled on first call',
    r'\bwhat becomes of\b|\bwhat came of\b': 'effect, result',
    # Ratios and rates.
    r'\b(?:bits|steps|images|seconds|milliseconds|bytes|lines|tokens|codes'
    r'|values|files|updates|terms|entries|pixels) (?:a|an) '
    r'(?:token|step|image|second|pixel|code|epoch|example|device|process'
    r'|batch|record|file|shard|dimension|level|position|size)\b': 'per',
    # Terms.
    r'\bdialects?\b': 'convention',
    r'(?<!handwritten )(?<!\')\bdigits?\b'
    r'(?! (?:data|of (?:precision|the number)))': 'level index',
    r'\bstays? whole\b|\bkept whole\b|\bare whole\b|\bis whole\b': 'replicated',
    r'\blaid out\b': 'unrolled; arranged',
    r'\blook-ups?\b(?! table)': 'nearest-neighbour search',
    r'\bdamaged?\b(?!: )': 'corrupted, corruption',
    r'\bmoving averages?\b': 'EMA',
    r'\bshare of log2\b': 'normalized entropy',
    r'\bheld to\b|\bholds? .{0,20}\bto the contract': 'checked against',
    r'\b(?:goes|go|going|went|gone) on\b': 'resume, continue',
    r'\bstarts? from\b|\bstarted from\b': 'is initialized from',
    r'\bpulled back\b': 'back-propagated',
    r'\btall(?:y|ies)\b': 'histogram, running sums',
    r'\bverdicts?\b': 'discriminator output',
    r'\bpass(?:es|ed)? over\b(?! (?:the|all|every|an?) )': 'skip',
    r'\bspread over\b(?! seeds)|\bstates how\b': (
        'shards, constrains the sharding of'
    ),
    r'\bfacts\b': 'metadata',
    r'\bpictures? of\b': 'N in figures; image of',
    r'\bin small\b|\ball at once\b|\bat the same at once\b': 'plain words',
    r'\bis asked (?:of|for)\b|\bare asked for\b|\bwas asked (?:of|for)\b': (
        'is requested'
    ),
    r'\blooks? through\b|\blooks? .{1,20} over\b': 'load, check',
    r'\brefus(?:e|es|ed|ing|al)\b': 'reject, raise',
    r'\bnot a number and\b|\bcannot do without\b': 'requires',
    r'\bspoil(?:s|t|ed)?\b|\bbroken off\b|\bmend(?:s|ed)?\b': (
        'corrupt, interrupt, fix'
    ),
}
_INLINE_CODE = re.compile(r'`[^`]*`')
# Rows of experiments/fault_suite: stored results, in the words of their run.
_MEASURED = re.compile(r'\| [A-G]\d+ \|')
_PATTERN = {re.compile(idiom, re.IGNORECASE): idiom for idiom in _IDIOMS}


def texts(path):
  """Yields (line number, line) of what a person reads in a file."""
  source = path.read_text(encoding='utf-8')
  if path.suffix == '.md':
    code = False
    for number, line in enumerate(source.splitlines(), 1):
      code ^= line.lstrip().startswith('```')
      if not code and line.strip() and not _MEASURED.match(line):
        yield number, _INLINE_CODE.sub('', line)
    return
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield token.start[0], _INLINE_CODE.sub('', token.string)
  for node in ast.walk(ast.parse(source)):
    if isinstance(
        node, ast.Module | ast.ClassDef | ast.FunctionDef
    ) and ast.get_docstring(node):
      first = node.body[0].lineno
      for number, line in enumerate(
          node.body[0].value.value.splitlines(), first
      ):
        if line.strip():
          yield number, _INLINE_CODE.sub('', line)


def count(paths):
  """Returns the number of lines and [(path, number, idiom, line), ...]."""
  lines, found = 0, []
  for path in paths:
    for number, line in texts(path):
      lines += 1
      for pattern, idiom in _PATTERN.items():
        for _ in pattern.finditer(line):
          found.append((path, number, idiom, line.strip()))
  return lines, found


def _check(paths):
  lines, found = count(paths)
  assert lines > 50
  worst = collections.Counter(idiom for _, _, idiom, _ in found).most_common(5)
  assert 100 * len(found) / lines < _MOST_PER_HUNDRED, (worst, found[:20])


def test_docstrings_and_comments():
  _check([_ROOT / 'launch.py', *sorted((_ROOT / 'fsq_jax').rglob('*.py'))])


def test_configs():
  _check(sorted((_ROOT / 'configs').rglob('*.py')))


def test_documentation():
  _check([
      path
      for folder in ('configs', 'experiments', 'fsq_jax', '.github')
      for path in sorted((_ROOT / folder).rglob('*.md'))
  ] + [_ROOT / 'README.md'])
