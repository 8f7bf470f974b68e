"""How far positions reach, by the numbers of published configs."""

import pytest
from transformers import LlamaConfig, MistralConfig

from hf_longspec.evaluation.room import check_room, positions_of


@pytest.mark.parametrize(
    ("rope", "stated", "positions"),
    [
        (None, 8192, 8192),
        ({"rope_type": "linear", "factor": 4.0}, 4096, 16384),  # vicuna-7b-v1.5-16k
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),  # Qwen2.5
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            131072,
            131072,
        ),
    ],
)
def test_positions(rope, stated, positions):
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope and rope["rope_type"] == "llama3" else {}
    rope = None if rope is None else rope | numbers | {"rope_theta": 10000.0}
    assert positions_of(LlamaConfig(max_position_embeddings=stated, rope_parameters=rope)) == positions


def test_a_text_must_fit():
    config = MistralConfig(max_position_embeddings=100)
    check_room(config, 60, 40)
    with pytest.raises(ValueError, match="task lcc: a context of 60 and 41 new tokens are more than the target's 100"):
        check_room(config, 60, 41, "task lcc: ")
