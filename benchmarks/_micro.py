import json, os, sys, time, torch, traceback
torch.manual_seed(0)
dev="cuda"
res={}
def t(name, f, n=5, warm=2):
    try:
        for _ in range(warm): f()
        torch.cuda.synchronize(); a=torch.cuda.Event(True); b=torch.cuda.Event(True)
        a.record()
        for _ in range(n): f()
        b.record(); torch.cuda.synchronize()
        ms=a.elapsed_time(b)/n
        res[name]=ms; print(f"{name:60s} {ms:9.3f} ms", flush=True); return ms
    except Exception as e:
        print(name, "FAILED", repr(e)[:300], flush=True); res[name]=repr(e)[:300]
def part(f):
    try: f()
    except Exception: traceback.print_exc()
    torch.cuda.empty_cache()
from pocketlm.core import columns, column_kernel as ck, linalg
from pocketlm.core.spec import QuantSpec
from pocketlm.core.stats import Hessian
import pocketlm.core.stats as st
print(torch.__version__, torch.cuda.get_device_name())
import triton; print("triton", triton.__version__)
spec=QuantSpec(bits=4)
def walk():
    for O in (4096,14336):
        w=torch.randn(128,O,device=dev); s=torch.rand(128,O,device=dev)*.1+.05
        u=torch.triu(torch.randn(128,128,device=dev)*.05)+torch.eye(128,device=dev)
        for R,W in ((32,1),(16,1),(64,2),(32,4),(16,4)):
            t(f"walk O={O} R={R} W={W}", lambda: ck.walk(w,u,spec,s,None,None,None,program_rows=R,warps=W),n=20)
        mask=torch.rand(128,O,device=dev)<.5
        t(f"walk mask O={O}", lambda: ck.walk(w,u,None,None,None,mask,None),n=20)
def correct():
    O,I=1024,1024
    x=torch.randn(4096,I,device=dev)@torch.randn(I,I,device=dev)
    h=Hessian(I,dev); h.add(x.bfloat16())
    ref=(x.bfloat16().double().T@x.bfloat16().double())*2/4096
    print("hessian rel err", float((h.matrix_II().double()-ref).abs().max()/ref.abs().max()))
    f=h.inverse_factor(.01,None,.15)
    sh=h.shrunk_II(.15).double(); sh.diagonal().add_(.01*sh.diagonal().mean())
    print("factor err", float((f.upper_II.double().T@f.upper_II.double()@sh-torch.eye(I,device=dev)).abs().max()), f.rung)
    from pocketlm.quant.gptq import sweep
    from pocketlm.quant.grid import searched_grid, minmax_grid
    from pocketlm.quant import grid as g
    w=torch.randn(O,I,device=dev)*.02
    for sym in (True,False):
        sp=QuantSpec(bits=4,symmetric=sym)
        gr=minmax_grid(w,sp,torch.bfloat16)
        a=sweep(w,f,gr,sp); keep=columns.serves
        columns.serves=lambda t: False
        b=sweep(w,f,gr,sp); columns.serves=keep
        print("sweep differing codes", sym, float((a!=b).double().mean()))
        k1=searched_grid(w,sp,torch.bfloat16,h.diagonal_I(),smallest=.3,steps=24)
        ks=g.kernel_serves; g.kernel_serves=lambda *a: False
        k2=searched_grid(w,sp,torch.bfloat16,h.diagonal_I(),smallest=.3,steps=24); g.kernel_serves=ks
        print("grid differing scales", float((k1.scale_OG!=k2.scale_OG).double().mean()))
    from pocketlm.quant.refine import renewed_codes
    from pocketlm.quant.grid import round_to_grid
    p=round_to_grid(w,k1,sp); hh=sh.float()
    a=renewed_codes(w,p,hh,sp); columns.serves=lambda t: False
    b=renewed_codes(w,p,hh,sp); columns.serves=keep
    print("refine differing codes", float((a.codes_OI!=b.codes_OI).double().mean()))
    A=torch.randn(512,1024,device=dev); B=torch.randn(1024,768,device=dev)
    for terms in (1,3): print("product", terms, float((linalg.product(A,B,terms=terms).double()-A.double()@B.double()).norm()/(A.double()@B.double()).norm()))
    print("fp32", float(((A@B).double()-A.double()@B.double()).norm()/(A.double()@B.double()).norm()))
def hess():
    for T,I in ((8192,14336),(8192,4096)):
        x=torch.randn(T,I,device=dev,dtype=torch.bfloat16); s=torch.zeros(I,I,device=dev)
        t(f"hessian mm+add T={T} I={I}", lambda: s.add_(torch.mm(x.T,x,out_dtype=torch.float32)))
        t(f"hessian addmm full T={T} I={I}", lambda: torch.addmm(s,x.T,x,out_dtype=torch.float32,out=s))
        for P in (1920,3840,7680):
            def f():
                for a in range(0,I,P):
                    b=min(a+P,I); p=s[a:b,:b]; torch.addmm(p,x[:,a:b].T,x[:,:b],out_dtype=torch.float32,out=p)
            t(f"hessian panels {P} T={T} I={I}", f)
        del s
        h=Hessian(I,dev); t(f"Hessian.add T={T} I={I}", lambda: h.add(x))
        t(f"matrix_II I={I}", lambda: h.matrix_II()); t(f"effective_rank I={I}", lambda: h.effective_rank())
        from pocketlm.engine.health import InputWatch
        w=InputWatch(I,torch.device(dev)); t(f"watch T={T} I={I}", lambda: w.add(x))
        del h,x; torch.cuda.empty_cache()
def prod():
    for O,I in ((14336,4096),(4096,14336)):
        w=torch.randn(O,I,device=dev); h=torch.randn(I,I,device=dev)
        t(f"fp32 mm {O}x{I}", lambda: w@h,n=2); t(f"product1 {O}x{I}", lambda: linalg.product(w,h,terms=1)); t(f"product3 {O}x{I}", lambda: linalg.product(w,h))
        torch.backends.cuda.matmul.allow_tf32=True; t(f"tf32 mm {O}x{I}", lambda: w@h); torch.backends.cuda.matmul.allow_tf32=False
        r=torch.randn(I,O,device=dev); e=torch.randn(128,O,device=dev); u=torch.randn(128,I,device=dev)
        t(f"addmm_ rest {I}x{O} k128", lambda: r.addmm_(u.T,e,alpha=-1))
        q=torch.randn(I,O,device=dev); t(f"slope 128x{I}x{O}", lambda: h[:128]@q)
        t(f"slope product3 128x{I}x{O}", lambda: linalg.product(h[:128],q))
def factor():
    for I in (4096,14336):
        x=torch.randn(2*I,I,device=dev); h=x.T@x/(2*I); del x; h.diagonal().add_(.1)
        t(f"cholesky {I}", lambda: torch.linalg.cholesky_ex(h),n=2,warm=1)
        for lib in ("cusolver","magma"):
            try:
                torch.backends.cuda.preferred_linalg_library(lib); t(f"cholesky {I} {lib}", lambda: torch.linalg.cholesky_ex(h),n=2,warm=1)
            except Exception as e: print(lib, repr(e)[:200])
        torch.backends.cuda.preferred_linalg_library("default")
        l=torch.linalg.cholesky_ex(h)[0].flip(0,1).contiguous()
        for side in (256,512,1024,2048):
            linalg.SOLVED_SIDE=side
            c=l.clone()
            def f(): c.copy_(l); linalg.invert_upper(c)
            t(f"invert_upper {I} side {side}", f, n=2,warm=1)
        linalg.SOLVED_SIDE=512
        eye=torch.eye(I,device=dev)
        t(f"solve_triangular {I}", lambda: torch.linalg.solve_triangular(l,eye,upper=True),n=2,warm=1)
        t(f"inverse_factor {I}", lambda: linalg.inverse_factor(h,.01),n=2,warm=1)
        del h,l,eye,c; torch.cuda.empty_cache()
def small():
    for B,G in ((14336,32),(4096,112)):
        a=torch.randn(B,G,G,device=dev); a=a@a.mT+G*torch.eye(G,device=dev); r=torch.randn(B,G,1,device=dev)
        t(f"solve {B}x{G}", lambda: torch.linalg.solve(a,r),n=3,warm=1)
        t(f"cholesky_solve {B}x{G}", lambda: torch.cholesky_solve(r,torch.linalg.cholesky_ex(a)[0]),n=3,warm=1)
    from pocketlm.prune.patterns import kept, _rank
    from pocketlm.core.stored import SparsitySpec
    s=torch.rand(14336,128,device=dev); sp=SparsitySpec.read("2:4")
    t("kept 2:4 14336x128", lambda: kept(s.T.contiguous().T,sp),n=20)
    from pocketlm.formats.packing import pack
    c=torch.randint(-8,8,(14336,4096),device=dev,dtype=torch.int8); t("pack 14336x4096", lambda: pack(c,4))
    from pocketlm.quant import grid_kernel as gk
    from pocketlm.quant.grid import multiples_tried, searched_grid, minmax_grid, round_to_grid
    w=torch.randn(14336,4096,device=dev); imp=torch.rand(4096,device=dev)+.1
    for G,W in ((8,4),(4,4),(4,2)):
        gk.GROUPS,gk.WARPS=G,W
        t(f"grid search 24 G={G} W={W}", lambda: gk.search(w,spec,torch.bfloat16,imp,list(multiples_tried(spec,.3,24))),n=3,warm=1)
        t(f"left_over 5 G={G} W={W}", lambda: gk.left_over(w,spec,torch.bfloat16,imp,list(multiples_tried(spec,.6,5)),imp),n=3,warm=1)
    gk.GROUPS,gk.WARPS=8,4
    gr=minmax_grid(w,spec,torch.bfloat16); t("round_to_grid", lambda: round_to_grid(w,gr,spec)); p=round_to_grid(w,gr,spec)
    t("dequantize", lambda: p.dequantize()); t("by_column", lambda: gr.by_column((14336,4096),spec,torch.randperm(4096,device=dev)))
which=sys.argv[1:] or ["correct","hess","factor","prod","small","walk"]
for name in which: part(globals()[name])
out=os.environ.get("OUT")
if out: json.dump(res,open(os.path.join(out,"micro.json"),"w"),indent=1)
