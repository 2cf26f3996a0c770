"""llama.cpp asked through llama-cpp-python: token ids, logits, image tokens and greedy answers of two GGUF files."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _QUIET(level: int, text: bytes, data: Any) -> None:
    """What libmtmd tells of itself, which is much."""


class LlamaCpp:
    """`model.gguf` and, where it is asked for, `mmproj.gguf` of a folder, on one thread, everything in float32."""

    def __init__(self, folder: Path, *, sees: bool = False, context: int = 512) -> None:
        import llama_cpp

        self.cpp = llama_cpp
        self.llama = llama_cpp.Llama(
            str(folder / "model.gguf"), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=1,
            n_threads_batch=1, logits_all=True, flash_attn=False, type_k=0, type_v=0, verbose=False,
        )  # fmt: skip
        self.eye: Any = None
        if sees:
            import llama_cpp.mtmd_cpp as mtmd

            self.mtmd = mtmd
            mtmd.mtmd_helper_log_set(_QUIET, None)
            said = mtmd.mtmd_context_params_default()
            said.use_gpu, said.n_threads, said.warmup, said.print_timings = False, 1, False, False
            said.flash_attn_type = 0
            self.eye = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), self.llama._model.model, said)
            assert self.eye is not None, "libmtmd does not read the mmproj"

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if self.eye is not None:
            self.mtmd.mtmd_free(self.eye)
        self.llama.close()

    def ids(self, text: str) -> list[int]:
        """Of a text whose special tokens are such."""
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """[len(ids), V]: after every token."""
        self.llama.reset()
        self.llama.eval(ids)
        return np.array(self.llama.scores[: len(ids)])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest `count` tokens behind a text."""
        return self._on(self.logits(ids)[-1], count)

    def see(self, text: str, image: Image.Image) -> tuple[list[int], NDArray[np.float32]]:
        """Reads a text in which libmtmd's marker stands for the image.

        (ids, -1 at the image's places; logits [V] behind it). `tokens` are then the image's [n, D].
        """
        mtmd, cpp = self.mtmd, self.cpp
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8))
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(image.width, image.height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        words = text.encode()
        asked = mtmd.mtmd_input_text(words, len(words), True, True)
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            assert mtmd.mtmd_tokenize(self.eye, chunks, ctypes.byref(asked), bitmaps, 1) == 0
            ids: list[int] = []
            seen = []
            for place in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, place)
                many = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    told = ctypes.c_size_t()
                    tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(told))
                    ids += tokens[: told.value]
                    continue
                ids += [-1] * many
                assert mtmd.mtmd_encode_chunk(self.eye, chunk) == 0
                wide = cpp.llama_model_n_embd_inp(self.llama._model.model)
                made = mtmd.mtmd_get_output_embd(self.eye)
                seen.append(np.ctypeslib.as_array(made, (many * wide,)).reshape(many, wide).copy())
            self.tokens = np.concatenate(seen)
            self.llama.reset()
            cpp.llama_memory_clear(cpp.llama_get_memory(self.llama.ctx), True)
            end = cpp.llama_pos()
            done = mtmd.mtmd_helper_eval_chunks(
                self.eye, self.llama.ctx, chunks, 0, 0, self.llama.n_batch, True, ctypes.byref(end)
            )
            assert done == 0 and end.value == len(ids)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
        self.llama.n_tokens = end.value
        rows = cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return ids, np.array(np.ctypeslib.as_array(rows, (self.llama.n_vocab(),)))

    def answer(self, text: str, image: Image.Image, count: int) -> list[int]:
        """The likeliest `count` tokens behind a text with an image."""
        return self._on(self.see(text, image)[1], count)

    def _on(self, logits: NDArray[np.float32], count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            made.append(int(logits.argmax()))
            self.llama.eval([made[-1]])
            logits = np.array(self.llama.scores[self.llama.n_tokens - 1])
        return made
