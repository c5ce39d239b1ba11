# Trains a network that config/search_swinir_bsd.py found, and measures it on Set5.
# python train_base.py config/base_swinir_bsd.py --arch=out/search_swinir_bsd_drnas/arch.json
# python prepare.py --dataset=set5 --path=FOLDER
# python analyze.py --out_dir=out/base_swinir_bsd --images=set5
include('shared/swinir_bsd.py')
out_dir = 'out/base_swinir_bsd'
batch_size = 8
max_iters = 20000
eval_interval = 1000
val_portion = 0.1
min_lr = 1e-6
