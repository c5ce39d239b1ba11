# Trains a network of SwinIR's space on DIV2K by the recipe of SwinIR-light; a node of 8 GPUs.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_swinir.py --arch=out/search_swinir_drnas/arch.json
# Measure it on Set14:
# python prepare.py --dataset=set14 --path=FOLDER
# python analyze.py --out_dir=out/base_swinir --images=set14
include('shared/swinir_div2k.py')
out_dir = 'out/base_swinir'
drop_path = 0.1
eval_iters = 100
val_portion = 0.02
