# Retrains what a search on TinyStories found, on one to four GPUs.
# torchrun --standalone --nproc_per_node=4 train_base.py config/base_tinystories.py --arch=out/search_tinystories_drnas/arch.json
include('shared/tinystories.py')
out_dir = 'out/base_tinystories'
max_iters = 12000
val_portion = 0.01
