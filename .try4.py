from pathlib import Path
import tempfile, pocketlm, pocketlm.engine.machine as m
m.MEASURE_SECONDS=0
from tests.unit.prune.conftest import save, TEXT
d=Path(tempfile.mkdtemp()); src=save("llama", d/"s"); (d/"t.txt").write_text(TEXT*60)
pocketlm.compress(src, {"steps":[{"method":"depth","blocks":1},{"method":"flap","channels":32,"heads":1}]}, d/"o", calibration=str(d/"t.txt"), samples=4, seq_len=32)
print((d/"o"/"README.md").read_text()); print((d/"o"/"pocketlm"/"recipe.yaml").read_text())
