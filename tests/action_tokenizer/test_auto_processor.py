"""Files that are written here load in Transformers' AutoProcessor and give the same ids."""

import json
import os
import subprocess
import sys

import numpy as np

from action_tokenizer import FastTokenizer

CODE = """
import sys, json, numpy as np
from transformers import AutoProcessor
folder, actions, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chunks = np.load(actions)
ids = processor(chunks)
decoded = processor.decode(ids)
refused = []
for broken in (ids[0][:-1], ids[0] + ids[1]):
    try:
        processor.decode([broken])
    except ValueError as error:
        refused.append(str(error))
try:
    processor(chunks * 100)
except ValueError as error:
    refused.append(str(error))
np.savez(out, decoded=decoded, ids=json.dumps(ids), refused=len(refused))
"""


def test_auto_processor_reads_our_files(fitted, chunks, tmp_path):
    fitted.save_pretrained(tmp_path / "tokenizer", processor_code=True)
    np.save(tmp_path / "actions.npy", chunks[:40])
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / name) for name in ("tokenizer", "actions.npy", "out.npz")]
    subprocess.run([sys.executable, "-c", CODE, *arguments], check=True, env=environment, capture_output=True)
    with np.load(tmp_path / "out.npz") as out:
        ids, decoded, refused = json.loads(str(out["ids"])), out["decoded"], int(out["refused"])
    assert ids == fitted.encode(chunks[:40])
    np.testing.assert_allclose(decoded, fitted.decode(ids), atol=1e-9)
    assert refused == 3


def test_code_is_written_only_on_request(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 4
    assert FastTokenizer.from_pretrained(tmp_path).horizon == 10
