# Retrains what a search on OpenWebText found, on a node of 8 GPUs.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_owt.py --arch=out/search_owt_drnas/arch.json
include('shared/owt.py')
out_dir = 'out/base_owt'
val_portion = 0.0005
