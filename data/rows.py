"""Reads the rows of data sets: the files beside this one, a user's own, those of the Hub."""

import ast
import contextlib
import csv
import gzip
import io
import json
import sys
import zlib
from importlib import import_module
from pathlib import Path

KEYS = ("data", "rows", "examples", "train", "validation", "test")  # of rows in a JSON object
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FILES = (".jsonl", ".json", ".parquet", *SEPARATORS)  # any other name may be one of the Hub


class UserError(ValueError):
    """A mistake in what the user gave: the command line shows it as one line, no traceback."""


def optional(name):
    """An optional package; UserError names the pip command if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"this needs a package: pip install {package}") from error


# ---------------------------------------- one row
def check_row(row):
    """UserError for what is no row, or holds what neither a tokenizer nor a file takes."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, not {type(row).__name__}")
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"field {field!a}: has a lone surrogate, which is no text") from None
        except RecursionError:
            raise UserError(f"field {field!a}: is nested too deep") from None
    need(row.get("held_out") in (None, "", True, False), "held_out", "must be true or false")


def get_field(row, *names):
    """The first of these fields that a row has and that is not null; UserError names them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UserError(missing(row, *names))


def missing(row, name, *others):
    """What to say of a row that has neither this field nor one of its other names."""
    also = f" (or {', '.join(others)})" if others else ""
    return f"field {name!a} is missing{also}; the row has {list(row)!a:.200}{rows_within(row)}"


def rows_within(row):
    """A hint for what is no row, but an object that holds rows under a key."""
    lists = [key for key, value in row.items() if isinstance(value, list) and value]
    keys = [key for key in lists if all(isinstance(part, dict) for part in row[key])]
    return f"; for the rows under a key, name it: FILE:{keys[0]!a:.40}" if keys else ""


def need(ok, field, what):
    """UserError that names the field of a row, unless ok."""
    if not ok:
        raise UserError(f"field {field}: {what}")


def need_number(row, field, count=False):
    """UserError unless the field is a number from 0 up, or a count from 1 up."""
    value = row[field]
    if count:
        need(type(value) is int and value > 0, field, "must be whole and positive")
    ok = type(value) in (int, float) and 0 <= value <= sys.float_info.max
    need(ok, field, "must be a number, at least 0")


# ---------------------------------------- one row of a task
def source_text(row, *names):
    """The text in the first of these fields that a row has. A list of sentences is joined, and its
    tags, <S> and </S>, are dropped."""
    text = get_field(row, *names)
    if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
        text = " ".join(text)
    ok = isinstance(text, str) and text.strip()
    name = next((name for name in names if row.get(name) is not None), names[0])
    need(ok, name, f"must be a string that is not blank, not {text!a:.40}")
    if "<S>" in text:
        text = " ".join(text.replace("<S>", " ").replace("</S>", " ").split())
    return text


def word_design(row, builders):
    """{"rows", "blocks", "max_commands"} of a row of strbuild, with a palette for each builder."""
    item = {field: get_field(row, field) for field in ("rows", "blocks", "max_commands")}
    rows, palettes = item["rows"], item["blocks"]
    ok = isinstance(rows, list)
    ok = ok and all(isinstance(line, str) and not line.strip("#.") for line in rows)
    ok = ok and "#" in "".join(rows) and len(set(map(len, rows))) == 1
    need(ok, "rows", "must be strings of # and ., of one length, with a #")
    ok = isinstance(palettes, list) and len(palettes) >= builders
    ok = ok and all(isinstance(ids, list) for ids in palettes)
    ok = ok and all(is_block(block) for ids in palettes for block in ids)
    ok = ok and all(any(block.split(":")[-1] != "air" for block in ids) for ids in palettes)
    need(ok, "blocks", f"must be {builders} lists of block ids, or more, none of air alone")
    need_number(item, "max_commands", count=True)
    return item | {"blocks": palettes[:builders]}


def is_block(block):
    """Whether a value can be the id of a block: a word."""
    return isinstance(block, str) and block.split() == [block]


def house_design(row):
    """All fields of a row of housebuild, in our form (see HouseBuild). The legend has . and blank,
    as air, if the layers do."""
    layers, legend = house_layers(row), house_legend(row)
    letters = set("".join(line for layer in layers for line in layer))
    need(letters <= set(legend), "layers", "has a letter that is not in the legend (or inventory)")
    legend = {k: block for k, block in legend.items() if k not in " ." or k in letters}
    item = {"player_hp": 5, "spider_damage": 0, "limited_resource": True, "max_commands": 600}
    item |= {field: row[field] for field in item if row.get(field) is not None}
    need_number(item, "player_hp")
    need_number(item, "spider_damage")
    need_number(item, "max_commands", count=True)
    need(type(item["limited_resource"]) is bool, "limited_resource", "must be true or false")
    return {"legend": legend, "layers": layers} | item


def house_legend(row):
    """{letter: block id} of a row; a letter's block may head a list."""
    field, legend = "legend (or inventory)", get_field(row, "legend", "inventory")
    need(isinstance(legend, dict), field, "must map letters to block ids")
    named = {k: v[0] if isinstance(v, list) and v else v for k, v in legend.items()}
    named = {k: v for k, v in named.items() if v is not None}  # Parquet: letters of other rows
    ok = all(is_block(block) and len(letter) == 1 for letter, block in named.items())
    need(ok, field, "must map single letters to block ids")
    return {" ": "air", ".": "air"} | named


def house_layers(row):
    """layers[y][z][x] of a row with [layer], {"0": layer} or [{"y": 0, "rows": layer}]."""
    field, spec = "layers (or target_spec.layers)", row.get("target_spec") or row
    layers = spec.get("layers") if isinstance(spec, dict) else None
    if isinstance(layers, dict):
        layers = [{"y": y, "rows": layer} for y, layer in layers.items() if layer is not None]
    need(isinstance(layers, list) and layers, field, "must be layers, each a list of rows")
    by_height = {}
    for y, layer in enumerate(layers):
        if isinstance(layer, dict):
            y, layer = layer.get("y", y), layer.get("rows")
        ok = isinstance(layer, list) and all(isinstance(line, str) and line for line in layer)
        need(ok and layer, field, 'must be lists of rows (strings), or {"y", "rows"}')
        by_height[str(y)] = layer
    heights = [str(y) for y in range(len(layers))]
    need(set(by_height) == set(heights), field, "must have y = 0, 1, 2, ..., each once")
    layers = [by_height[y] for y in heights]
    widths = {len(line) for layer in layers for line in layer}
    need(len({*map(len, layers)}) == len(widths) == 1, field, "must be of one size")
    return layers


# ---------------------------------------- all rows
def read_rows(dataset):
    """[(place, row)] of a file or a Hub data set; place is "FILE:LINE" (.json, .parquet and the
    Hub: the row's number). UserError, in one line, for what can not be read.

    Files: .jsonl, .json, .csv, .tsv, all also with .gz, .parquet; any other is read as .jsonl.
    NAME:PART takes a split of the Hub, or the rows that a JSON object holds under that key.
    """
    try:
        return [(f"{dataset}:{number}", row) for number, row in numbered_rows(dataset)]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {error.strerror or error}") from None
    except (ValueError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"--dataset {dataset}: {' '.join(str(error).split())}") from None


def numbered_rows(dataset):
    """[(line or number, row)] of a file or a Hub data set; any exception for what is neither."""
    name, part = dataset, ""
    if ":" in dataset and not Path(dataset).exists():
        name, _, part = dataset.partition(":")
    zipped = name.lower().endswith(".gz")
    kind = Path(name.lower().removesuffix(".gz")).suffix
    if kind not in FILES and not Path(name).exists():
        return hub_rows(name, part)
    if part and kind != ".json":
        raise UserError(f"--dataset {dataset}: only .json files and the Hub have parts")
    data = Path(name).read_bytes()
    if kind == ".parquet":
        table = optional("pyarrow.parquet").read_table(io.BytesIO(data))
        return enumerate(table.to_pylist(), 1)
    text = decoded(name, gzip.decompress(data) if zipped else data)
    if kind in SEPARATORS:
        return csv_rows(name, text, SEPARATORS[kind])
    if kind == ".json" and not has_rows_as_lines(text):
        return json_rows(name, part, read_json(name, text))
    lines = enumerate(text.split("\n"), 1)
    return [(k, read_json(f"{name}:{k}", line)) for k, line in lines if line.strip()]


def decoded(name, data):
    """The text of a file in UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: {error}") from None


def has_rows_as_lines(text):
    """Whether the text of a .json file is that of a .jsonl file, as the Hub has many."""
    first, _, rest = text.strip().partition("\n")
    return first.startswith("{") and first.rstrip().endswith("}") and rest.strip() != ""


def read_json(place, text):
    """The value of a JSON text. A key that stands twice is refused: one value would be lost."""

    def unique(pairs):
        row = {}
        for key, value in pairs:
            if key in row:
                raise UserError(f"{place}: field {key!a} stands twice")
            row[key] = value
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


def json_rows(name, part, value):
    """[(number, row)] of a JSON file: a list of rows, an object that holds one under `part` or
    under one of KEYS, an object {id: row}, or an object that is itself the only row."""
    if isinstance(value, list) and not part:
        return enumerate(value, 1)
    if not isinstance(value, dict):
        raise UserError(f"{name}: must hold rows, not one {type(value).__name__}")
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows]
    lists = [key for key in lists if all(isinstance(row, dict) for row in value[key])]
    keys = [key for key in lists if key == part or (not part and key in KEYS)]
    if len(keys) > 1 or (part and not keys):
        raise UserError(f"{name}: rows stand under {lists!a:.200}; name one, as in FILE:KEY")
    if keys:
        return enumerate(value[keys[0]], 1)
    return enumerate(value.values(), 1) if has_rows_by_id(value) else [(1, value)]


def has_rows_by_id(value):
    """Whether an object is {id: row}: all of its values are objects, with a field in common. One
    of a single letter does not count: a house has objects too, {letter: block} and {"0": layer}.
    """
    if not value or not all(isinstance(row, dict) for row in value.values()):
        return False
    return any(len(field) > 1 for field in set.intersection(*map(set, value.values())))


def csv_rows(name, text, separator):
    """[(line, row)] of CSV with a header. A cell that is a list, object, true or false, as JSON or
    as Python writes it, or a JSON number, is that value, any other is text."""
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    header, rows = next(table, []), []
    line = table.line_num + 1
    for cells in table:
        if len(cells) > len(header) or len(set(header)) < len(header):
            columns = f"{header!a:.200}"
            raise UserError(f"{name}:{line}: needs a cell for each of the columns {columns}")
        if cells:
            rows.append((line, dict(zip(header, map(csv_value, cells)))))
        line = table.line_num + 1
    return rows


def csv_value(cell):
    """The value of a cell of CSV."""
    unreadable = ValueError, TypeError, SyntaxError, RecursionError, MemoryError
    if cell[:1] in "[{-0123456789tf":
        with contextlib.suppress(*unreadable):
            return json.loads(cell)
    if cell[:1] in "[{TF":
        with contextlib.suppress(*unreadable):
            value = ast.literal_eval(cell)
            return value if isinstance(value, (list, dict, bool)) else cell
    return cell or None  # empty: missing, as pandas writes it


def hub_rows(name, split):
    """[(number, row)] of a split of a Hub data set, by default train or else the first."""
    try:
        import datasets

        found = datasets.load_dataset(name, **({"split": split} if split else {}))
        if not split:
            found = found["train" if "train" in found else next(iter(found))]
        return list(enumerate(found, 1))
    except ImportError:
        hint = "no such file; to take it as a Hub id: pip install datasets"
    except Exception as error:  # the Hub client's errors have no base class of their own
        hint = f"no such file, and the Hub says: {' '.join(str(error).split())[:200]}"
    raise UserError(f"--dataset {name}: {hint}")
