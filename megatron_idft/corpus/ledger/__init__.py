"""Which chunks of a job are done, shared by independent launches through one folder."""

from megatron_idft.corpus.ledger.files import LedgerError
from megatron_idft.corpus.ledger.ledger import Ledger, status_of
from megatron_idft.corpus.ledger.manifest import SettingsMismatch, read_manifest
from megatron_idft.corpus.ledger.status import Status

__all__ = ["Ledger", "LedgerError", "SettingsMismatch", "Status", "read_manifest", "status_of"]
