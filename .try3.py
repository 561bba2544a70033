import cProfile, pstats, sys, tempfile, time
from pathlib import Path
from tests.unit.prune.conftest import save, TEXT
import pocketlm, pocketlm.engine.machine as m, pocketlm.api, pocketlm.stages
m.MEASURE_SECONDS=0
d=Path(tempfile.mkdtemp()); src=save("llama", d/"s"); (d/"t.txt").write_text(TEXT*60)
def go(o, **k): pocketlm.compress(src, {"steps":[{"method":"flap","channels":32,"heads":1}]}, d/o, calibration=str(d/"t.txt"), samples=4, seq_len=32)
go("a")
p=cProfile.Profile(); t=time.time(); p.enable(); go("b"); p.disable(); print(time.time()-t)
pstats.Stats(p).sort_stats("cumtime").print_stats(45)
