"""Lowering an adapter to a standard LoRA adapter in Hugging Face PEFT's format, from files alone.

A method with exact factors loses nothing: ΔW = B·A is written as it is, with the scale inside B. Others can be
approximated by a truncated SVD, whose error is reported layer by layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import LowRank, MergeError, PluginError, SpecError, plugins
from peft_core.dtypes import name_of
from peft_core.errors import listed
from peft_core.merge import Contribution, merged_weight

from . import card, output, svd
from .adapter_files import AdapterFiles
from .checkpoint_files import CODES, DTYPE_OF_CODE, INDEX, SINGLE, Checkpoint, Reader, dtype_code, open_checkpoint
from .mapping import find_names, note_on_type, quantized
from .merge_plan import head_config, resizing
from .names import Names
from .peft_format import CONFIG, PREFIX, WEIGHTS, peft_config, target_parameters
from .reports import LoraReport, LoweredSite
from .runtimes import Request, Runtime, runtime
from .shards import Item, Progress, Writer

SVD = "truncated SVD"


def export_lora(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    fit: str | None = None,
    pad_rank: bool | None = None,
    svd_rank: int | None = None,
    svd_energy: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraReport:
    """Write an adapter of any method as a LoRA adapter that Hugging Face PEFT and serving runtimes load.

    Args:
        base: checkpoint directory of the base; its weights are read only for an SVD. adapter, out: directories.
        fit: `vllm`, `sglang` or `llama.cpp`. pad_rank: fill up with zeros, so that all layers have one rank that the
            runtime accepts; None: if `fit` asks for it.
        svd_rank, svd_energy: approximate by at most this rank, or by the smallest that keeps this share of ‖ΔW‖², what has
            no exact factors, and exact factors that are larger than that.
        dtype: of the factors; None: float32, or float64 where the adapter has it. Rounding to a narrower one is an error, too.

    Raises:
        MergeError: the method has no exact factors and no SVD is asked for. CheckpointError: an input cannot be read.
    """
    started = time.perf_counter()
    if svd_rank is not None and svd_rank < 1:
        raise SpecError(f"svd_rank is {svd_rank}; a rank is at least 1")
    if svd_energy is not None and not 0.0 < svd_energy <= 1.0:
        raise SpecError(f"svd_energy is {svd_energy}; it is a share between 0 and 1")
    code = dtype_code(dtype)
    target = runtime(fit) if fit else None
    directory, source = Path(base), AdapterFiles(adapter)
    config = output.read_config(directory)
    with (
        output.export_directory(out, [directory, adapter], overwrite) as temporary,
        Reader() as reader,
        torch.no_grad(),
    ):
        source.verify()
        lowering = _Lowering(directory, config, source, reader, svd_rank, svd_energy)
        lowered = dict(lowering.sites())
        losses = [SVD] if any(found.error for found in lowered.values()) else []
        if code is not None:
            before, lowered = lowered, _rounded(lowered, DTYPE_OF_CODE[code])
            if any(found.error > before[path].error for path, found in lowered.items()):
                losses.append(f"rounding to {dtype}")
        ranks = {path: len(factors.A) for path, factors in lowered.items()}
        rank, uniform = _rank(max(ranks.values()), target, pad_rank)
        padded = dict.fromkeys(ranks, rank) if uniform else ranks
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path, found in lowered.items():
            A, B = f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
            tensors[A], shapes[A] = found.A, (padded[path], found.A.shape[1])
            tensors[B], shapes[B] = found.B, (found.B.shape[0], padded[path])
        tensors |= {f"{PREFIX}{name}": source.tensor(key, reader) for name, key in source.trained.items()}
        items = [_item(key, tensor, shapes.get(key, tensor.shape), code) for key, tensor in sorted(tensors.items())]
        _write(temporary, items, tensors, progress)
        output.write_json(temporary / CONFIG, peft_config(directory, source, config, rank, padded))
        request = _request(directory, out, source)
        fields = head_config(directory, source.header, config)
        report = LoraReport(
            out=str(out),
            base=str(base),
            adapter=str(adapter),
            method=source.header.method.name,
            rank=rank,
            dtype=name_of(DTYPE_OF_CODE[items[0].dtype]),
            losses=tuple(losses),
            sites=tuple(LoweredSite(path, ranks[path], found.error) for path, found in lowered.items()),
            trained=tuple(source.header.trained),
            bytes=sum(item.nbytes for item in items),
            seconds=round(time.perf_counter() - started, 3),
            runtime=target.name if target else "",
            command=target.command(request, rank) if target else "",
            problems=(*target.problems(request), *_rank_problems(target, ranks, uniform)) if target else (),
            notes=(
                *note_on_type(source.header, config, directory, source.directory),
                *lowering.resizing(config),
                *_notes(source, ranks, rank, uniform),
            ),
        )
        marker = output.marker("lora", [source.header], fields, report.to_json())
        output.write_json(temporary / output.MARKER, marker)
        (temporary / card.NAME).write_text(card.lora(directory, source.header, report, fields), encoding="utf-8")
    return report


class _Lowering:
    """Factors of each site, exact or by SVD."""

    def __init__(
        self,
        base: Path,
        config: dict[str, Any],
        source: AdapterFiles,
        reader: Reader,
        rank: int | None,
        energy: float | None,
    ) -> None:
        self._source, self._reader = source, reader
        self._rank, self._energy = rank, energy
        self._info = plugins.method(source.header.method.name)
        self._checkpoint: Checkpoint | None = None
        self._names: Names | None = None
        # A directory with a configuration alone is enough for exact factors.
        if (base / SINGLE).is_file() or (base / INDEX).is_file() or not config:
            self._checkpoint = open_checkpoint(base)
            self._names = find_names(self._checkpoint, source.header, config, str(source.directory))

    def resizing(self, config: Mapping[str, Any]) -> Iterator[str]:
        """A remark on a base whose vocabulary must be resized before the adapter is loaded."""
        if self._checkpoint is None or self._names is None:
            return
        edits, found = resizing(self._checkpoint, self._names, [self._source], config)
        for what, size in zip(found, edits.values(), strict=True):
            yield f"{what}: resize the base before loading the adapter, base.resize_token_embeddings({size})"

    def sites(self) -> Iterator[tuple[str, svd.Truncated]]:
        """(path, factors) of every site.

        Raises:
            MergeError: a site has no exact factors, and no SVD is asked for.
        """
        wants_svd = self._rank is not None or self._energy is not None
        for path in self._source.sites:
            part = self._source.contribution(path, self._reader)
            factors, reason = self._exact(part)
            if factors is not None:
                yield path, svd.reduce(factors.A, factors.B, self._rank, self._energy)
            elif wants_svd:
                yield path, svd.truncate(self._delta(part), self._rank, self._energy)
            else:
                raise MergeError(f"{reason}; an approximation is written with --svd-rank R or --svd-energy 0.99")

    def _exact(self, part: Contribution) -> tuple[LowRank | None, str]:
        """The method's factors, or why there are none."""
        site = part.site
        try:
            found = plugins.call(part.method, "peft_lowrank", site=site, tensors=part.tensors, binding=part.binding)
        except MergeError as error:
            return None, str(error)
        except PluginError:
            if self._info.can(site.options).lowrank:
                raise
            return None, f"'{site.path}': method '{part.method}' has no exact low-rank factors: merge it"
        if found.A.shape != (len(found.A), site.in_features) or found.B.shape != (
            site.out_features,
            len(found.A),
        ):
            raise MergeError(
                f"method '{part.method}': peft_lowrank returned A {list(found.A.shape)} and B {list(found.B.shape)} for "
                f"'{site.path}', expected [rank, {site.in_features}] and [{site.out_features}, rank]"
            )
        return found, ""

    def _delta(self, part: Contribution) -> Tensor:
        """ΔW [out, in] against the base's weight."""
        path = part.site.path
        if self._checkpoint is None or self._names is None:
            raise MergeError("an SVD compares with the base's weights: give a base directory that holds them")
        if path in self._names.packed:
            raise quantized(self._names.packed[path], "an SVD compares with the base's weights: give")
        key = self._names.keys.get(f"{path}.weight")
        if key is None:
            raise MergeError(
                f"'{path}' is stored in another form in the base's files; load the base and save it again, then lower"
            )
        stored = self._reader.read(self._checkpoint.entries[key])
        weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
        weight = weight.T if part.site.transposed else weight
        return merged_weight(weight, [part]) - weight


def _rounded(lowered: Mapping[str, svd.Truncated], dtype: torch.dtype) -> dict[str, svd.Truncated]:
    """The factors with their errors in this dtype.

    Raises:
        MergeError: a factor is too large for it.
    """
    out = {path: svd.rounded(found, dtype) for path, found in lowered.items()}
    if lost := [path for path, found in out.items() if not math.isfinite(found.error)]:
        name = name_of(dtype)
        raise MergeError(
            f"'{lost[0]}': its factors are too large for {name}; write them as bfloat16 or float32 (--dtype)"
        )
    return out


def _rank(largest: int, target: Runtime | None, pad: bool | None) -> tuple[int, bool]:
    """The rank to write, and whether every layer gets it.

    vLLM, SGLang and llama.cpp scale all layers by one alpha/r, so a runtime's adapter has one rank throughout.
    """
    if pad is False:
        return largest, False
    if target is None:
        return largest, bool(pad)
    return target.rank(largest), True


def _rank_problems(target: Runtime, ranks: Mapping[str, int], uniform: bool) -> list[str]:
    """What stands in the way where padding was refused."""
    if uniform:
        return []
    found = []
    largest = max(ranks.values())
    if min(ranks.values()) < largest:
        found.append(f"{target.name} scales all layers alike, and their ranks differ: leave padding on")
    if target.ranks is not None and largest not in target.ranks:
        found.append(
            f"{target.name} accepts the ranks {listed(map(str, target.ranks), 12)}, not {largest}: leave padding on"
        )
    return found


def _item(key: str, tensor: Tensor, shape: tuple[int, ...], code: str | None) -> Item:
    """A tensor that is padded to this shape, in this dtype if it is a floating-point one."""
    floating = tensor.is_floating_point()
    dtype = DTYPE_OF_CODE[code] if code and floating else tensor.dtype
    return Item(key, CODES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


def _write(directory: Path, items: list[Item], tensors: Mapping[str, Tensor], progress: Progress | None) -> None:
    total, done = sum(item.nbytes for item in items), 0
    sizes = {item.key: item for item in items}
    with Writer(directory, items, {}, name=WEIGHTS) as writer:
        for key in writer.order:
            tensor = tensors[key]
            missing = [goal - size for goal, size in zip(sizes[key].shape, tensor.shape, strict=True)]
            if any(missing):
                tensor = nn.functional.pad(tensor, (0, missing[1], 0, missing[0]))
            writer.write(key, tensor)
            done += sizes[key].nbytes
            if progress is not None:
                progress(done, total)
        writer.write_index()


def _request(base: Path, out: str | Path, source: AdapterFiles) -> Request:
    sites = source.sites.values()
    return Request(
        base=card.base_name(base, source.header) or str(base),
        out=str(out),
        architecture=source.header.base.architecture,
        types=sorted({site.type for site in sites}),
        heads=list(source.header.trained),
        transposed=any(site.transposed for site in sites),
    )


def _notes(source: AdapterFiles, ranks: Mapping[str, int], rank: int, uniform: bool) -> Iterator[str]:
    smallest = min(ranks.values())
    if uniform and smallest < rank:
        spread = str(smallest) if smallest == max(ranks.values()) else f"{smallest} to {max(ranks.values())}"
        yield f"ranks of {spread} are filled up with zeros to {rank}"
    if source.header.trained:
        yield f"trained in full, and part of the adapter (PEFT's modules_to_save): {listed(source.header.trained)}"
    if found := target_parameters(source):
        yield (
            f"PEFT would take {listed(found, 3)} for experts: they are named by their weights (target_parameters), which "
            "takes peft 0.17 or later, and a base that is not quantized"
        )
