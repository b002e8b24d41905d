"""How far above its folder code looks: no more than a path of its own file rises, and never less."""

from __future__ import annotations

import ast

import pytest

from sparsity_atlas.tasks.code.upwards import FAR, rise

HERE = "import os\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
RISES = {
    "parents": (HERE + "A = Path(__file__).parents[2] / 'a'", 2),
    "own_folder": (HERE + "A = Path(__file__).resolve().parents[0]", 0),
    "parent_of_parent": ("A = open(Path(__file__).parent.parent / 'a')", 1),
    "over_two_names": (HERE + "UP = HERE.parent\nA = UP.parent", 2),
    "before_it_is_bound": (HERE + "def f():\n    return ROOT.parent\nROOT = HERE.parent", 2),
    "dirname": ("from os.path import dirname as d, dirname\nA = dirname(dirname(__file__))", 1),
    "dirname_over_lines": (
        "import os\nA = os.path.dirname(\n    os.path.abspath(\n os.path.dirname(__file__)))",
        1,
    ),
    "two_dots_joined": (HERE + "A = os.path.join(HERE, '..', '..', 'a')", 2),
    "pardir": (HERE + "A = os.path.join(HERE, os.pardir, 'a')", 1),
    "two_dots_of_a_name": (HERE + "UP = '..'\nA = HERE / UP", FAR),
    "two_dots_in_a_format": (HERE + "def f(n):\n    return open(f'{HERE}/../{n}')", 1),
    "divided": ("A = __import__('pathlib').Path(__file__) / '..' / '..'", 1),
    "in_a_function": (HERE + "def up(p):\n    return p.parent.parent\nA = up(HERE)", FAR + 1),
    "in_a_lambda": (HERE + "up = lambda p: p.parents[4]\nA = up(HERE)", 5),
    "of_a_result": (HERE + "def root():\n    return HERE.parent\nA = root().parent", 2),
    "of_an_attribute": (
        HERE + "class A:\n    def __init__(self):\n        self.root = HERE.parent\n"
        "    def f(self):\n        return self.root.parent",
        2,
    ),
    "of_a_property": (
        HERE + "class A:\n    @property\n    def root(self):\n        return HERE.parent\n"
        "    def f(self):\n        return self.root.parent",
        2,
    ),
    "of_a_default": ("from pathlib import Path\ndef f(p=Path(__file__).parents[1]):\n    p", 1),
    "of_a_container": (HERE + "A = {}\nA['r'] = HERE.parent\nB = A['r'].parent", 2),
    "of_a_list": (HERE + "A = []\nA.append(HERE.parent)\nB = A[0].parent", 2),
    "in_a_loop": (HERE + "while not (HERE / 'a').exists():\n    HERE = HERE.parent", 9),
    "over_all_parents": (HERE + "A = next(p for p in HERE.parents if (p / 'a').exists())", 9),
    "by_a_computed_number": (HERE + "def f(n):\n    return HERE.parents[n]", 9),
    "in_an_assignment_inside": (HERE + "if (A := HERE.parent).exists():\n    A.parent", 2),
    "of_another_module": ("import common\nA = common.HERE.parent.parent", FAR),
    "of_an_imported_name": ("from common import HERE\nA = HERE.parent.parent", FAR),
    "of_a_star": ("from common import *\nA = HERE / '..'", FAR),
    "of_an_argument": ("def f(root):\n    return root.parents[1]", FAR),
    "of_a_module_s_file": ("import sys\nA = sys.modules[__name__].__file__.rsplit('/', 3)[0]", 2),
    "of_inspect": (
        "import inspect, os\nA = os.path.dirname(os.path.dirname(inspect.getfile(f)))",
        1,
    ),
    "two_dots_of_the_working_folder": ("import os\nA = open(os.path.join('..', 'a'))", FAR),
    "of_a_lambda_s_result": (HERE + "root = lambda: HERE.parent\nA = root().parent", 2),
    "of_a_class_s_attribute": (HERE + "class P:\n    ROOT = HERE.parent\nA = P.ROOT.parent", 2),
    "of_a_text_that_is_filled": (
        HERE + "A = open('{}/../../a'.format(HERE)), '{}/..'.format(HERE)",
        1,
    ),
    "of_a_sum_of_texts": ("import os\nA = os.path.abspath(__file__ + '/../..')", 1),
    "of_a_percent": (HERE + "A = '%s/../..' % HERE", 2),
    "of_a_package": ("from pathlib import Path\nA = Path(__path__[0]).parent", 1),
    "of_its_resources": (
        "from importlib.resources import files\nA = files(__package__).parent.parent",
        2,
    ),
    "of_its_loader": ("from pathlib import Path\nA = Path(__loader__.path).parent.parent", FAR),
    "of_globals": ("from pathlib import Path\nA = Path(globals()['__file__']).parents[1]", 1),
    # And what has nothing to do with the code's place.
    "a_scratch_file": (
        "import tempfile\nfrom pathlib import Path\nA = Path(tempfile.mkdtemp()).parents[1]",
        0,
    ),
    "a_home": ("from pathlib import Path\nA = Path.home().parent.parent", 0),
    "a_variable": ("import os\nA = os.path.dirname(os.path.dirname(os.environ['X']))", 0),
    "a_tree": (
        HERE
        + "def f():\n    node = make()\n    return node.parent.parent\ndef make():\n    return 3",
        0,
    ),
    "in_a_docstring": (
        '"""Path(__file__).parents[3] and .parent.parent, \'..\'"""\n# dirname(dirname(__file__))',
        0,
    ),
    "two_dots_of_a_sentence": ("def f(d):\n    return d['a'].replace('..', '.').split('..')", 0),
    "two_dots_compared": ("def f(d):\n    return d['a'] == '..'", 0),
    "two_dots_with_a_name": ("A = open('../a.txt')", 0),
}


@pytest.mark.parametrize(("code", "expected"), RISES.values(), ids=RISES)
def test_how_far(code: str, expected: int) -> None:
    found = rise(ast.parse(code), 9)
    # Of what cannot be told more may count, never less.
    assert found == expected


def test_no_further_than_there_are_folders() -> None:
    assert rise(ast.parse("from pathlib import Path\nA = Path(__file__).parents[7]"), 2) == 2


def test_code_that_is_too_deep() -> None:
    tree = ast.parse("A = 1")
    inner = ast.parse("x", mode="eval").body
    for _ in range(5000):
        inner = ast.Attribute(inner, "a", ast.Load())
    assert isinstance(tree.body[0], ast.Assign)
    tree.body[0].value = inner
    assert rise(tree, 9) == FAR
