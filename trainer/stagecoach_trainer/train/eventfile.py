"""TensorBoard event files, written without TensorBoard: importing it takes longer than many a stage's first step.

A file is a sequence of TFRecords (length, masked CRC-32C of it, data, masked CRC-32C of that), each holding one `Event`
message of tensorflow/core/util/event.proto.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of the data."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(wall_time: float, step: int, rest: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + rest  # fields 1 and 2


class EventFile:
    """Appends scalars to an event file in a folder that TensorBoard is pointed at."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        path = folder / f"events.out.tfevents.{int(now):010d}.stagecoach"
        self._file: BinaryIO = path.open("ab")
        self._file.write(_record(_event(now, 0, _bytes_field(3, b"brain.Event:2"))))  # file_version
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._file.write(_record(_event(time.time(), step, _bytes_field(5, summary))))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
