"""The licences that the Hugging Face hub has a word for."""

from __future__ import annotations

import dataclasses

from flax_resnet.errors import UserError, did_you_mean

# https://huggingface.co/docs/hub/repositories-licenses, less those of families of language models.
LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail++",
    "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "unknown",
    "other",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class License:
    """What others may do with the weights."""

    id: str
    """The hub's word for it, such as "apache-2.0"; "other" needs a name and a link."""
    name: str | None = None
    """Of another licence: what it is called."""
    link: str | None = None
    """Of another licence: the address of its text."""

    def __post_init__(self) -> None:
        if self.id not in LICENSES:
            near = did_you_mean(str(self.id).lower(), LICENSES)
            raise UserError(
                f"license {self.id!r:.80} is not one that the hub knows{near}: expected one such "
                "as apache-2.0, mit or cc-by-4.0, or other, with a name and a link"
            )
        given = [bool(self.name), bool(self.link)]
        if given != [self.id == "other"] * 2:
            raise UserError(
                f"license {self.id!r} with name {self.name!r:.80} and link {self.link!r:.80}: "
                "expected both with 'other', and neither without"
            )
