"""The structs of ``kernels/include/flute/launch.h`` for ctypes; imports nothing heavy."""

from __future__ import annotations

import ctypes

MAX_PARTS = 16


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n", "k", "bits", "group_size", "dtype")),
        ("pair_table", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("part_rows", ctypes.c_int32 * MAX_PARTS),
        ("activation", ctypes.c_int32),
    ]


class DecodeConfig(ctypes.Structure):
    FIELDS = ("row_tiles", "row_warps", "splits", "slots", "warps", "overlap")
    _fields_ = [(name, ctypes.c_int32) for name in FIELDS]


class Sm90Config(ctypes.Structure):
    FIELDS = (
        *("columns", "warpgroups", "row_tiles", "row_groups"),
        *("splits", "stages", "x_stages", "overlap"),
    )
    _fields_ = [(name, ctypes.c_int32) for name in FIELDS]


class TileConfig(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("tokens", "splits", "x_slots", "record_slots")]


class Ahead(ctypes.Structure):
    _fields_ = [("records", ctypes.c_void_p), ("total", ctypes.c_int64), ("bytes", ctypes.c_int64)]


def open_library(path: str) -> ctypes.CDLL:
    """The kernels' C functions. The package's extension also needs torch, loaded before."""
    library = ctypes.CDLL(path)
    library.flute_record_words.restype = ctypes.c_int64
    if hasattr(library, "flute_tile_workspace"):  # a library of some of the kernels has none
        library.flute_tile_workspace.restype = ctypes.c_int64
    if hasattr(library, "flute_sm90_workspace"):
        library.flute_sm90_workspace.restype = ctypes.c_int64
    library.flute_error_text.restype = ctypes.c_char_p
    return library
