"""Rows of coding problems as HumanEval, MBPP and EvalPlus publish them, in HumanEval's fields."""

import ast
import itertools
import keyword

import sandbox
from data.rows import UserError, rows_within


def coding_item(row):
    """The item of a row; if parts of its tests are left out, `left_out` says which, and why."""
    fields = {field for field, value in row.items() if value is not None}
    has_test = "test" in fields
    left_out = []
    if fields & {"test_list", "assertion"} or ("text" in fields and not has_test):
        if "plus_input" in fields and not has_test:
            left_out = ["plus_input: without the types of its tuples and sets it is no test"]
        row = mbpp_row(row)
    elif "base_input" in fields and not has_test:
        row = evalplus_row(row)
    item = {field: text_of(row, field) for field in ("prompt", "entry_point", "test")}
    check_item(item)
    problem = item["prompt"], item["entry_point"], item["test"]
    if not sandbox.tests_of(*problem):
        raise UserError("field 'test' has no assert that reaches the candidate")
    item["test"], broken = sandbox.without_broken_tests(*problem)
    left_out += [f"no '{name}' is defined: {' '.join(test.split())[:100]}" for test, name in broken]
    return {**item, "left_out": left_out} if left_out else item


def check_item(item):
    """UserError that names the field of an item that can not be right."""
    name = item["entry_point"]
    if not name.isidentifier() or name == "aux" or keyword.iskeyword(name):
        said = f"must be a function's name other than aux, not {name[:40]!r}"
        raise UserError(f"field 'entry_point' {said}")
    tree, error = sandbox.syntax_tree(item["test"])
    if error or not any(node.args.args for node in sandbox.definitions(tree, "check")[-1:]):
        said = "must be Python that defines check(candidate)"
        raise UserError(f"field 'test' {said}{error and ': ' + error}")
    if error := sandbox.syntax_tree(sandbox.head_of(item["prompt"], name))[1]:
        raise UserError(f"field 'prompt' must be Python before the stub: {error}")


# ---------------------------------------- fields
def text_of(row, *fields):
    """The text of the first of `fields` that a row has; UserError."""
    for field in fields:
        if row.get(field) is not None:
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise UserError(f"field '{field}' must be a string, not {kind}")
            return row[field].replace("\r\n", "\n")
    needed = "prompt, entry_point, test (as HumanEval) or text, code, test_list (as MBPP)"
    hint = rows_within(row)
    raise UserError(f"field '{fields[0]}' is missing; a coding row needs {needed}{hint}")


def tree_of(source, field):
    tree, error = sandbox.syntax_tree(source)
    if error:
        raise UserError(f"field '{field}' must be Python: {error}")
    return tree


def body_of(row, *fields):
    """The statements of the first of `fields` that holds Python, as a text or a list of texts."""
    for field in fields:
        value = "" if row.get(field) is None else row[field]
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"field '{field}' must be a string or a list of strings")
        if body := tree_of("\n".join(parts).replace("\r\n", "\n"), field).body:
            return body
    return []


def inputs_of(row, field):
    """The inputs in a field of EvalPlus: for each call the list of its arguments."""
    inputs = [] if row.get(field) is None else row[field]
    if not isinstance(inputs, list) or not all(isinstance(each, list) for each in inputs):
        raise UserError(f"field '{field}' must be a list of lists of arguments")
    return inputs


# ---------------------------------------- MBPP
def mbpp_row(row):
    """A row of MBPP (`text` or `prompt`, `code`, `test_list`, `test_setup_code` or `test_imports`),
    or of EvalPlus' MBPP+ (a `test` that runs at once, or `assertion`), in HumanEval's fields."""
    task = text_of(row, "text", "prompt")
    code = tree_of(text_of(row, "code", "canonical_solution"), "code")
    tests = body_of(row, "test_list", "assertion")
    if not tests:
        raise UserError("field 'test_list' must be a list of tests, as strings")
    function = called_function(code, tests)
    tests += body_of(row, "test")
    check = ast.parse("def check(candidate): pass").body[0]
    check.body = tests
    setup = body_of(row, "test_imports") + body_of(row, "test_setup_code")
    test = "\n".join([*imports_for(code, tests), *map(ast.unparse, [*setup, check])])
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


# ---------------------------------------- EvalPlus
EVALPLUS_TEST = """
import copy, math
from math import inf, nan
reference = {{}}
exec({solution!r}, reference)
def near(found, wanted):
    if isinstance(wanted, (list, tuple)):
        alike = type(found) is type(wanted) and len(found) == len(wanted)
        return alike and all(isinstance(x, float) for x in wanted) and all(map(near, found, wanted))
    both_nan = found != found and wanted != wanted
    return both_nan or math.isclose(found, wanted, rel_tol=1e-7, abs_tol={tolerance})
def same(found, inputs):
    wanted = reference[{entry!r}](*copy.deepcopy(inputs))
    return found == wanted or (isinstance(wanted, (float, list, tuple)) and near(found, wanted))
def check(candidate):
"""


def evalplus_row(row):
    """A row of HumanEval+ as EvalPlus' files have it, in HumanEval's fields: the answers come from
    the reference solution, each input of `base_input` is a test, all of `plus_input` are one."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    solution = prompt + text_of(row, "canonical_solution")
    tree_of(solution, "canonical_solution")
    tolerance = row.get("atol") or 1e-6
    if type(tolerance) not in (int, float) or not tolerance >= 0:
        raise UserError("field 'atol' must be a number, at least 0")
    inputs, more = inputs_of(row, "base_input"), inputs_of(row, "plus_input")
    if not inputs:
        raise UserError("field 'base_input' must have an input")
    try_reference(solution, entry, inputs[0])
    test = EVALPLUS_TEST.format(solution=solution, entry=entry, tolerance=tolerance)
    for each in inputs:
        test += f"    assert same(candidate(*{each!r}), {each!r})\n"
    if more:
        test += f"    for inputs in {more!r}:\n"
        test += "        assert same(candidate(*copy.deepcopy(inputs)), inputs)\n"
    return {"prompt": prompt, "entry_point": entry, "test": test}


def try_reference(solution, entry, inputs):
    """UserError if the reference solution has no answer to these inputs, in the sandbox."""
    head = "from math import inf, nan\ndef check(candidate):"
    test = f"{head}\n    assert [candidate(*{inputs!r})]"
    problem = {"prompt": "", "entry_point": entry, "test": test}
    if error := sandbox.run_tests(problem, "", solution)["error"]:
        raise UserError(f"field 'canonical_solution' fails on the first input: {error}")
