"""Sphinx: the pages are MyST Markdown and one notebook, the reference comes from docstrings.

python -m sphinx -W --keep-going -n -b html docs docs/_build/html
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from flax import linen as nn
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parents[1]))

import flax_resnet

LONGEST_DEFAULT = 60

project = "flax_resnet"
author = "the authors of flax_resnet"
copyright = "the authors of flax_resnet, Apache-2.0"
version = release = flax_resnet.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"flax_resnet {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

# The notebook is shown as it was executed; tests/docs executes it, and every other block.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries = False

# Foreign types, and ours that are no public name: nothing to link to without a network.
FOREIGN = "collections|etils|flax|jax|jaxlib|numpy|optax|os|pathlib|typing"
nitpick_ignore_regex = [
    (r"py:.*", rf"({FOREIGN})\..*"),
    (r"py:class", r"Array|Decoder|Exported|Layers|Module|Off|Path|Pretrained|Row"),
    (r"py:class", r"flax_resnet\.(data|exporting|inference|weights)\..*"),
]


def is_config(what: str, obj: Any) -> bool:
    """Whether an object is a class whose fields are listed in place of its signature."""
    return what == "class" and (dataclasses.is_dataclass(obj) or issubclass(obj, nn.Module))


def drop_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str, returns: str
) -> tuple[str, str] | None:
    """A network has up to 40 fields: they stand once, in the list below the class."""
    return ("", "") if is_config(what, obj) else None


def skip_fields(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Fields are in their class's list already; what is left are methods and properties."""
    member = inspect.isroutine(obj) or isinstance(obj, property)
    return None if member or what != "class" else True


def list_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Lists a config's fields, whose docstrings stand below them, as "Attributes:" would."""
    if not is_config(what, obj) or any(line == "Attributes:" for line in lines):
        return
    documented = ModuleAnalyzer.for_module(obj.__module__).find_attr_docs()
    fields = [(field, documented.get((obj.__name__, field))) for field in obj.__annotations__]
    if any(doc for _, doc in fields):
        lines += ["", "Attributes:"]
    for field, doc in fields:
        first, *rest = doc or [""]
        lines += [f"  {field}: {first}", *(f"    {line}" for line in rest if line)]


def add_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Says each field's default after its text, and types by their last name."""
    if not is_config(what, obj):
        return
    fields = {field.name: field.default for field in dataclasses.fields(obj)}
    found = []
    for line in "\n".join(lines).replace("\n:", "\n\0:").split("\n\0"):
        entry = re.match(r":ivar (\w+):", line)
        kind = re.match(r":vartype (\w+): (.*)", line)
        default = fields.get(entry[1], dataclasses.MISSING) if entry else dataclasses.MISSING
        if kind:
            line = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", line)
        if default is not dataclasses.MISSING:
            shown = default.__name__ if inspect.isclass(default) else repr(default)
            if len(shown) > LONGEST_DEFAULT:
                shown = f"{type(default).__name__}(...)"
            line = f"{line.rstrip()} Default: ``{shown}``."
        found += line.split("\n")
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Connects the above; napoleon is between the two at priority 500."""
    app.connect("autodoc-process-signature", drop_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", list_fields, priority=400)
    app.connect("autodoc-process-docstring", add_defaults, priority=600)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Fields"
