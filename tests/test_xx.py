import time
from command_line import *
from family import config_of
import cProfile,pstats
def test_x(family,tmp_path):
    c=write_config(config_of(family,tmp_path/"runs"),tmp_path)
    t=time.process_time(); w=time.time()
    p=cProfile.Profile(); p.enable()
    r=meiosis("search",c,"--run","a"); p.disable()
    print("cpu",time.process_time()-t,"wall",time.time()-w)
    pstats.Stats(p).sort_stats("cumtime").print_stats(45)
    small = ("--set", "search.baselines=[]", "--budget", 6, "--set", "search.finalists=1")
    print(meiosis("search", c, "--run", "second", "--json", *small))
