"""Station 3, prepare: pictures to pixels, conversations to ids with label masks, rows to batches."""

from leveret.inputs.batches import Item, collate
from leveret.inputs.chat import CHATS, ChatFormat, Encoded, encode, find_chat, literal, published
from leveret.inputs.orders import ORDERS, padding_share, plan
from leveret.inputs.resize import fit, prepare
from leveret.inputs.tiles import prepare_all, prepare_tiles

__all__ = [
    "CHATS",
    "ORDERS",
    "ChatFormat",
    "Encoded",
    "Item",
    "collate",
    "encode",
    "find_chat",
    "fit",
    "literal",
    "padding_share",
    "plan",
    "prepare",
    "prepare_all",
    "prepare_tiles",
    "published",
]
