"""From a student's notebook to the few statements that make one answer.

The cell of an exercise is found by its comment, `# exercise 05.2`. What the grader runs is not the notebook, with its
trainings and figures, but the statements that the answer needs, directly or through others: the function, the helpers
that it calls, the imports and constants that they use, wherever above they stand. Nothing is run here, only read.
"""

import ast
import json
import re
import symtable
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"(?im)^[ \t]*#+[ \t]*exercise[ \t]+(\d\d\.\d+)\b")
CHECK = re.compile(r"""(?m)^[ \t]*(?:checks\.)?check\(["'](\d\d\.\d+)["']""")
MAGIC = re.compile(r"(?m)^([ \t]*)(?:[%!?].*|[\w.]+\?{1,2}|[\w, \t]+=[ \t]*[%!].*)$")
ANEW = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
SETTING = re.compile(r"\.(set_|manual_seed|seed)")  # of a module: torch.set_default_dtype, numpy.random.seed
LARGEST = 50 << 20  # bytes of a notebook


class Unreadable(ValueError):
    """A submission, or a part of it, that cannot be read; the words say why."""


def code_cells(path: Path) -> list[str]:
    """The sources of a notebook's code cells; Unreadable where it is none."""
    try:
        if not path.is_file():
            raise Unreadable("this is no file")
        if path.stat().st_size > LARGEST:
            raise Unreadable(f"the file has more than {LARGEST >> 20} MB")
        book = json.loads(path.read_text(encoding="utf-8"))
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise Unreadable("this is no notebook: the file is not JSON") from error
    except OSError as error:
        raise Unreadable(f"the file cannot be read: {error.strerror}") from error
    cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list):
        raise Unreadable("this is no notebook: it has no list of cells (format 4 is read)")
    found = []
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", "")
            found.append("".join(map(str, source)) if isinstance(source, list) else str(source))
    return found


def marked(cells: list[str]) -> dict[str, int]:
    """The exercises that a notebook has, each with the last cell that carries its mark (or calls its check)."""
    found = {}
    for i, source in enumerate(cells):
        for number in MARK.findall(source):
            found[number] = i
    for i, source in enumerate(cells):
        for number in CHECK.findall(source):
            found.setdefault(number, i)
    return found


def answer_to(number: str, cells: list[str], names: list[str]) -> tuple[str, str]:
    """The program of one answer, and the expression for the tuple of answers; Unreadable where the cell is no Python."""
    place = marked(cells)[number]
    try:
        own = _statements(cells[place])
    except SyntaxError as error:
        raise Unreadable(f"the cell is no Python: {error.msg}, line {error.lineno} of the cell") from error
    above = []
    for source in cells[:place]:
        try:
            above += _statements(source)
        except SyntaxError:
            pass  # a broken cell elsewhere is not this answer's fault
    asked = _names(ast.parse(wanted := f"({_asked(number, own) or ', '.join(names)},)").body[0])
    program = _slice([*above, *own], asked.used | asked.later)
    return "\n".join(ast.unparse(each) for each in program), wanted


def _statements(source: str) -> list[ast.stmt]:
    """The top-level statements of a cell, without the lines that are Jupyter's; SyntaxError, also for a null byte."""
    if re.match(r"\s*%%(?!time|timeit|capture|prun)", source):
        return []  # a cell in another language
    for text in (source, MAGIC.sub(r"\1pass", source)):
        try:
            return ast.parse(text).body
        except SyntaxError as error:
            broken = error
        except (ValueError, RecursionError, MemoryError) as error:
            broken = SyntaxError(str(error) or "it is nested too deeply")
    raise broken


def _asked(number: str, statements: list[ast.stmt]) -> str:
    """What the cell's own call of `check` hands over; empty where there is none, or nothing in it."""
    for each in reversed(statements):
        call = each.value if isinstance(each, ast.Expr) else None
        name = getattr(call.func, "id", getattr(call.func, "attr", None)) if isinstance(call, ast.Call) else None
        if name in ("check", "passes") and len(call.args) > 1 and getattr(call.args[0], "value", None) == number:
            return ", ".join(ast.unparse(arg) for arg in call.args[1:])
    return ""


@dataclass(frozen=True)
class Names:
    """The global names of a statement: those it binds anew, those it binds perhaps or changes, those it uses at once, and
    those that its functions use whenever they are called."""
    bound: set[str]
    changed: set[str]
    used: set[str]
    later: set[str]


def _names(statement: ast.stmt) -> Names:
    try:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    except (SyntaxError, RecursionError):
        return Names(set(), set(), set(), set())
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    later, tables = set(), list(table.get_children())
    while tables:
        inner = tables.pop()
        later |= {s.get_name() for s in inner.get_symbols() if s.is_global()}
        tables += inner.get_children()
    stored = [n for n in ast.walk(statement) if isinstance(n, (ast.Subscript, ast.Attribute)) and not isinstance(n.ctx, ast.Load)]
    called = [each.value.func for each in _inside(statement) if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)]
    changed = set()
    for target in (*stored, *(f for f in called if isinstance(f, ast.Attribute))):  # table[0] = 1, table.size = 1, table.append(1)
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        changed |= {target.id} if isinstance(target, ast.Name) else set()
    anew = isinstance(statement, ANEW) or isinstance(statement, ast.AnnAssign) and statement.value is not None
    return Names(bound, changed, used, later) if anew else Names(set(), changed | bound, used, later)


def _inside(statement: ast.AST):
    """The statement and those of its blocks, but for functions and classes, which run when they are called."""
    if isinstance(statement, ast.stmt):
        yield statement
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
        for each in ast.iter_child_nodes(statement):
            yield from _inside(each)


def _slice(statements: list[ast.stmt], needed: set[str]) -> list[ast.stmt]:
    """Those statements that the names need at the end, in their order.

    A name needs the last statement above that binds it, and what changes it after that. A statement needs what it uses
    above itself; what its functions use may also be bound below it.
    """
    names, end = [_names(each) for each in statements], len(statements)
    bound = {kind: set().union(*(n.bound for n, s in zip(names, statements) if isinstance(s, (ast.Import, ast.ImportFrom)) == kind))
             for kind in (True, False)}
    for n, each in zip(names, statements):  # torch.testing.assert_close(a, b) and plt.show() change nothing
        if not (isinstance(each, ast.Expr) and SETTING.search(ast.unparse(each))):
            n.changed.difference_update(bound[True] - bound[False])
    kept = {i for i, each in enumerate(statements) if isinstance(each, ast.ImportFrom)
            and (each.module == "__future__" or any(alias.name == "*" for alias in each.names))}
    seen: set[tuple[str, int]] = set()
    wanted = [(name, end) for name in needed]
    while wanted:
        name, before = wanted.pop()
        if (name, before) in seen:
            continue
        seen.add((name, before))
        for i in reversed(range(before)):
            if name in names[i].bound or name in names[i].changed:
                if i not in kept:
                    kept.add(i)
                    wanted += [(each, i) for each in names[i].used | names[i].later]
                    wanted += [(each, end) for each in names[i].later]
                if name in names[i].bound:
                    break
    return [statements[i] for i in sorted(kept, key=lambda i: (getattr(statements[i], "module", "") != "__future__", i))]
