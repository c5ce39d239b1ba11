# Trains a network of config/search_swinir_bsd.py, and measures it on Set5.
# python train_base.py config/base_swinir_bsd.py --arch=out/search_swinir_bsd_drnas/arch.json
# python prepare.py --dataset=set5 --path=FOLDER
# python analyze.py --out_dir=out/base_swinir_bsd --images=set5
out_dir = 'out/base_swinir_bsd'
dataset = 'bsd'
batch_size = 8
max_iters = 20000
eval_interval = 1000
val_portion = 0.1
flip = True
weight_optimizer = 'adam'
beta2 = 0.999
weight_decay = 0.0
learning_rate = 5e-4
min_lr = 1e-6
warmup_iters = 100
