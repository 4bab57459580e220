"""What size and order the sources keep, as findings for tools/style.py: files, classes, imports, names.

A file has at most 600 lines, a class of the product at most 300. Modules of the Python package do not import each other
in a circle (imports inside functions and under TYPE_CHECKING happen later, or never). No two of its classes have one
name, nor have two of the C++ product's, but those that are named here.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LONGEST_FILE = 600
LONGEST_CLASS = 300
PACKAGE = "python/flashoptim_native/"
CPP_FOLDERS = ("include/", "src/", "libtorch/")
CODE = (".h", ".cpp", ".cu", ".cuh", ".py", ".sh")
# The CPU's and the device's: flashoptim:: and flashoptim::cuda::.
TWINS = frozenset({"Plan", "StepOptions"})
CPP_CLASS = re.compile(r"^(?:class|struct|enum class) (\w+)(?: final)?(?: : .*)? \{")


def cpp_classes(text: str) -> Iterator[tuple[str, int, int]]:
    """Names, first lines and numbers of lines of classes at the margin, where clang-format puts a namespace's."""
    lines = text.split("\n")
    for start, line in enumerate(lines):
        if found := CPP_CLASS.match(line):
            end = next((n for n in range(start, len(lines)) if lines[n].startswith("}")), start)
            yield found[1], start + 1, end - start + 1


def python_classes(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def module_name(file: str) -> str:
    return file.removeprefix("python/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


def imports(file: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of the package that one of them imports; not the packages it is in."""
    own = module_name(file).split(".")
    package = own if file.endswith("/__init__.py") else own[:-1]
    found: set[str] = set()
    for node in at_import(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            found.add(inner if inner in modules else source)
    return (found & modules) - {".".join(own)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first one at both ends; empty where there is no circle."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):  # (none of a file that does not parse)
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def findings(root: Path, files: list[str]) -> list[tuple[str, str]]:
    """(file, message) of everything that is not as it should be."""
    found = []
    graph: dict[str, set[str]] = {}
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    modules = {module_name(name) for name in files if name.startswith(PACKAGE) and name.endswith(".py")}
    for name in files:
        if not name.endswith(CODE):
            continue
        text = (root / name).read_text()
        count = text.count("\n")
        if count > LONGEST_FILE:
            found.append((name, f"{count}: lines; at most {LONGEST_FILE}"))
        language, classes = "C++", cpp_classes(text)
        if name.endswith(".py"):
            try:
                tree = ast.parse(text)
            except SyntaxError:  # ruff says so
                continue
            language, classes = "Python", python_classes(tree)
            if name.startswith(PACKAGE):
                graph[module_name(name)] = imports(name, tree, modules)
        for title, line, lines in classes if name.startswith((PACKAGE, *CPP_FOLDERS)) else ():
            if lines > LONGEST_CLASS:
                found.append((name, f"{line}: class {title} has {lines} lines; at most {LONGEST_CLASS}"))
            if title not in TWINS:
                homes[language, title].append(name)
    for (_, title), places in homes.items():
        found += [(place, f"1: class {title} is in {places[0]}, too; one name, one thing") for place in places[1:]]
    if ring := circle(graph):
        found.append((f"python/{ring[0].replace('.', '/')}.py", f"1: imports in a circle: {' -> '.join(ring)}"))
    return found
