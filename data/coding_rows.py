"""Rows of coding problems as MBPP and EvalPlus publish them, in the fields of HumanEval."""

import ast
import itertools

import sandbox
from data.rows import UserError


def text_of(row, *fields):
    """The text of the first of `fields` that a row has; UserError."""
    for field in fields:
        if row.get(field) is not None:
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise UserError(f"field '{field}' must be a string, not {kind}")
            return row[field].replace("\r\n", "\n")
    needed = "prompt, entry_point, test (as HumanEval) or text, code, test_list (as MBPP)"
    raise UserError(f"field '{fields[0]}' is missing; a coding row needs {needed}")


def tree_of(source, field):
    tree, error = sandbox.syntax_tree(source)
    if error:
        raise UserError(f"field '{field}' must be Python: {error}")
    return tree


def mbpp_row(row):
    """A row of MBPP (`text` or `prompt`, `code`, `test_list`, `test_setup_code` or `test_imports`),
    or of EvalPlus' MBPP+ (a `test` that runs at once, or `assertion`), in HumanEval's fields."""
    task = text_of(row, "text", "prompt")
    code = tree_of(text_of(row, "code", "canonical_solution"), "code")
    tests = row.get("test_list") or row.get("assertion") or []
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not tests or not all(isinstance(test, str) for test in tests):
        raise UserError("field 'test_list' must be a list of tests, as strings")
    tests = tree_of("\n".join(tests), "test_list").body
    function = called_function(code, tests)
    tests += tree_of(row.get("test") or "", "test").body
    imports = imports_for(code, tests)
    check = ast.parse("def check(candidate): pass")
    check.body[0].body = tests
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    test = "\n".join([*imports, *setup, ast.unparse(check)]).replace("\r\n", "\n")
    return {"prompt": stub(code, function, task), "entry_point": function.name, "test": test}


def called_function(code, tests):
    """The function of `code` that the tests are of: the outermost that they call."""
    functions = {node.name: node for node in code.body if isinstance(node, ast.FunctionDef)}
    for node in itertools.chain.from_iterable(map(ast.walk, tests)):
        name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if name in functions:
            return functions[name]
    raise UserError("field 'test_list' must call a function that field 'code' defines")


def stub(code, function, task):
    """What HumanEval calls a prompt: the function's first line, with `task` as its docstring, and
    the imports which that line needs; nothing of the solution."""
    head = ast.parse("def f(): pass").body[0]
    head.name, head.args, head.returns = function.name, function.args, function.returns
    head.body = [ast.Expr(ast.Constant("\n    ".join(["", *task.strip().split("\n"), ""])))]
    imports = imports_for(code, [head])
    return "\n".join([*imports, "\n" * bool(imports), ast.unparse(head), ""]).lstrip("\n")


def imports_for(code, nodes):
    """The imports of `code` that define a name in `nodes`."""
    parts = itertools.chain.from_iterable(map(ast.walk, nodes))
    names = {node.id for node in parts if isinstance(node, ast.Name)}
    return [
        ast.unparse(node)
        for node in code.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and names & {alias.asname or alias.name for alias in node.names}
    ]


EVALPLUS_TEST = """
import copy, math
reference = {{}}
exec({solution!r}, reference)
def same(found, inputs):
    wanted = reference[{entry!r}](*copy.deepcopy(inputs))
    if isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-7, abs_tol={tolerance})
    return found == wanted
def check(candidate):
"""


def evalplus_row(row):
    """A row of HumanEval+ as EvalPlus' files have it, in HumanEval's fields: the answers come from
    the reference solution, each input of `base_input` is a test, all of `plus_input` are one."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    solution = prompt + text_of(row, "canonical_solution")
    tolerance = float(row.get("atol") or 1e-6)
    test = EVALPLUS_TEST.format(solution=solution, entry=entry, tolerance=tolerance)
    for inputs in row["base_input"]:
        test += f"    assert same(candidate(*{inputs!r}), {inputs!r})\n"
    if plus := row.get("plus_input"):
        test += f"    for inputs in {plus!r}:\n"
        test += "        assert same(candidate(*copy.deepcopy(inputs)), inputs)\n"
    return {"prompt": prompt, "entry_point": entry, "test": test}
