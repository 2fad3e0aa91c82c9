"""Which layout a source has: every layout with the sign it is known by and what its publishers allow.

A layout is chosen only where it is the only one whose sign is there; otherwise the user has to say which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from likeness.data.folder import METADATA
from likeness.prepare.ingest import celeba, layouts, tables
from likeness.prepare.ingest.face import Faces
from likeness.prepare.ingest.tree import PICTURES, Tree
from likeness.types import InputError

HQ_TERMS = "non-commercial research only, no redistribution of images or of derived data"
UNKNOWN_TERMS = "not stated by this layout: as the pictures' owners say"


@dataclass(frozen=True)
class Layout:
    """One way in which faces lie in folders and files."""

    faces: Callable[[Tree], Faces]
    sign: Callable[[Tree], bool]
    """Whether a source looks so."""
    look: str
    """The sign in words."""
    split: str = "given"
    """One of `splits.SPLITS`: the split where the user names none."""
    licence: str = UNKNOWN_TERMS
    """What its publishers allow, as MODEL_LICENSES.md has it."""
    source: str = ""
    """Where they say so."""


def has_hq(tree: Tree) -> bool:
    """CelebA-HQ's pictures, by its own folder, or `images` with masks at the top that no metadata lists."""
    named = tree.folder(celeba.HQ_PICTURES[0]) is not None
    return named or (
        METADATA not in tree.folders.get("", {})
        and any(name in tree.folders for name in celeba.HQ_PICTURES[1:])
        and (has_parts(tree) or any(name in tree.folders for name in celeba.HQ_MASKS))
    )


def has_parts(tree: Tree) -> bool:
    return any(celeba.HQ_PARTS in folder.split("/") for folder in tree.folders)


def has_hq_captions(tree: Tree) -> bool:
    return tree.folder(celeba.HQ_CAPTIONS[0]) is not None or celeba.HQ_CAPTIONS[1] in tree.folders


def has_suffix(tree: Tree, suffix: str) -> bool:
    return any(name.endswith(suffix) for names in tree.folders.values() for name in names)


def has_plain_pictures(tree: Tree) -> bool:
    """Pictures at the top, or in folders called as splits."""
    tops = [names for folder, names in tree.folders.items() if folder == "" or folder in layouts.SPLIT_NAMES]
    return any(name.lower().endswith(PICTURES) for names in tops for name in names)


LAYOUTS: dict[str, Layout] = {
    "celeba": Layout(
        celeba.celeba,
        lambda tree: tree.find("list_attr_celeba.txt") is not None and tree.folder("img_align_celeba") is not None,
        "img_align_celeba and list_attr_celeba.txt",
        "person",
        "non-commercial research only",
        "the agreement on CelebA's page, mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "celebamask": Layout(
        celeba.celebamask,
        lambda tree: has_hq(tree) and not has_hq_captions(tree),
        "CelebA-HQ-img or images, with masks by part or whole",
        "random",
        HQ_TERMS,
        "README of github.com/switchablenorms/CelebAMask-HQ",
    ),
    "mm_celeba": Layout(
        celeba.mm_celeba,
        lambda tree: (
            has_hq_captions(tree) and (has_hq(tree) or any(name in tree.folders for name in celeba.HQ_PICTURES[1:]))
        ),
        "CelebA-HQ-img or images, with celeba-caption or text",
        "mm_celeba",
        HQ_TERMS,
        "README of github.com/IIGROUP/MM-CelebA-HQ-Dataset",
    ),
    "ffhq": Layout(
        layouts.ffhq,
        lambda tree: layouts.ffhq_folder(tree) is not None and tree.folder("FFHQ_Captions_Final") is None,
        "images1024x1024 or thumbnails128x128",
        "given",
        "the data set CC BY-NC-SA 4.0, each picture under its own licence (in its row); not for face recognition",
        "README of github.com/NVlabs/ffhq-dataset",
    ),
    "face_mogle": Layout(
        layouts.face_mogle,
        lambda tree: "face" in tree.folders and ("mask" in tree.folders or has_suffix(tree, "text.json")),
        "face with mask or text.json",
        "face_mogle",
        f"made from CelebA-HQ, FFHQ or FairFace, whose terms hold; of MM-CelebA-HQ: {HQ_TERMS}",
        "README of github.com/XavierJiezou/Face-MoGLE and of the data sets it is made from",
    ),
    "mmface_dit": Layout(
        layouts.mmface_dit,
        lambda tree: bool(layouts.mmface_dit_roots(tree)) or tree.folder("FFHQ_Captions_Final") is not None,
        "train or test with images beside masks or sketches",
        "given",
        f"made from CelebA-HQ and FFHQ, whose terms hold: {HQ_TERMS}; FFHQ CC BY-NC-SA 4.0",
        "README of the MMFace-DiT code (arXiv 2603.29029) and of the data sets it is made from",
    ),
    "imagefolder": Layout(layouts.imagefolder, lambda tree: bool(layouts.metadata_folders(tree)), "metadata.jsonl"),
    "parquet": Layout(tables.parquet, lambda tree: has_suffix(tree, ".parquet"), "*.parquet"),
    "webdataset": Layout(tables.webdataset, lambda tree: has_suffix(tree, ".tar"), "*.tar"),
    "folder": Layout(layouts.folder, has_plain_pictures, "pictures at the top or in train, validation and test"),
}
"""Name -> layout, as `likeness prepare ingest --layout` has it."""


def recognise(tree: Tree) -> str:
    """The one layout that a source has; `folder` only where nothing else fits.

    Raises:
        InputError: none fits, or several do.
    """
    found = [name for name, layout in LAYOUTS.items() if name != "folder" and layout.sign(tree)]
    if not found and LAYOUTS["folder"].sign(tree):
        found = ["folder"]
    if len(found) > 1:
        seen = " and ".join(f"{name} ({LAYOUTS[name].look})" for name in found)
        raise InputError(f"{tree.root} could be {seen}: say which with --layout")
    if not found:
        count = sum(name.lower().endswith(PICTURES) for names in tree.folders.values() for name in names)
        hint = f"--layout folder takes the {count} pictures in its folders" if count else "it holds no pictures either"
        raise InputError(f"{tree.root} has no layout that is known here ({', '.join(LAYOUTS)}): {hint}")
    return found[0]
