#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# Attention over a part of the keys gives an output and its log-sum-exp, and two parts are merged by these: o1 and o2
# count as exp(lse1) and exp(lse2). A query that may see no key of a part has lse -inf, so that this part counts
# nothing. The CPU's flash kernel gives such a query lse 0 instead: the weight of one key with score 0. The output is 0
# and finite, so the merge is silently too small, by as much as the other part's scores are.
# Who meets it: whoever splits keys (prefix and new tokens, ring attention, paged attention) and tries it on a CPU.
# The lse of masked rows must be set to -inf by hand.
#
# Seen on 2026-11-30:
#   lse of the masked row, kernel 0.00, by definition -inf
#   merged row over the true one: 0.88 with the kernel's lse, 1.00 after masking it by hand
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room"
"$room/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6
cd "$room"
bin/python - << 'PYTHON'
import torch

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, length, 16) for length in (3, 8, 8))
mask = torch.zeros(1, 1, 3, 8)
mask[..., 1, :4] = -torch.inf  # query 1 sees nothing of the first four keys
mask[..., 2, 2] = -torch.inf
whole, _ = attend(query, key, value, attn_mask=mask)
(out1, lse1), (out2, lse2) = (
    attend(query, key[:, :, part], value[:, :, part], attn_mask=mask[..., part]) for part in (slice(4), slice(4, 8))
)


def merge(lse1):
    weight = torch.sigmoid(lse1 - lse2)[..., None]
    return out1 * weight + out2 * (1 - weight)


true = (query @ key[:, :, :4].mT / 4 + mask[..., :4]).logsumexp(-1)
print(f"lse of the masked row, kernel {lse1[0, 0, 1]:.2f}, by definition {true[0, 0, 1]:.2f}")
raw, mended = (merge(lse)[0, 0, 1].norm() / whole[0, 0, 1].norm() for lse in (lse1, true))
print(f"merged row over the true one: {raw:.2f} with the kernel's lse, {mended:.2f} after masking it by hand")
torch.testing.assert_close(lse1[..., [0, 2]], true[..., [0, 2]])  # rows that see a key are right
torch.testing.assert_close(merge(true), whole)
assert lse1[0, 0, 1] == 0 and true[0, 0, 1] == -torch.inf and raw < 0.9
PYTHON
